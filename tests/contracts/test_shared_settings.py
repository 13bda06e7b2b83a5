"""Every setting that a config may hold says what it is at its field: --print-config and errors take the words there."""

import pkgutil
from importlib import import_module

import pytest
from pydantic import BaseModel

import poisonshield
from poisonshield.config import Settings

PARENTS = {"Settings"}


def all_settings():
    """Every Settings class of the package, after importing all of it but ops, commands and benchmarks."""
    # Kernels decide when they are imported how they run, so ops stay with their own tests; they have no settings.
    left_out = (
        "poisonshield.ops",
        "poisonshield.commands",
        "poisonshield.bench",
        "poisonshield._C",
        "poisonshield._cpu",
    )
    for module in pkgutil.walk_packages(poisonshield.__path__, "poisonshield.", onerror=lambda name: None):
        if not module.name.startswith(left_out):
            import_module(module.name)
    found, queue = [], [Settings]
    while queue:
        for child in queue.pop().__subclasses__():
            if child.__module__.startswith("poisonshield."):
                found.append(child)
                queue.append(child)
    return sorted(set(found), key=lambda c: (c.__module__, c.__qualname__))


@pytest.mark.parametrize("settings", all_settings(), ids=lambda c: f"{c.__module__}.{c.__qualname__}")
def test_each_setting_has_words(settings):
    blocks = lambda field: isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    bare = [name for name, field in settings.model_fields.items() if not field.description and not blocks(field)]
    assert not bare

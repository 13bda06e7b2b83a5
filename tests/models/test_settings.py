"""Settings of models, methods and the rendered world: each one says what it is, at its field."""

import importlib
import inspect
import pkgutil

import pytest

import poisonshield
from poisonshield.config import Settings

ROOMS = ("losses", "methods", "models", "world")


def configs():
    """Every Settings class that a file of the four rooms defines."""
    for room in ROOMS:
        package = importlib.import_module(f"{poisonshield.__name__}.{room}")
        for file in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(file.name)
            for _, found in inspect.getmembers(module, inspect.isclass):
                for kind in (found, getattr(found, "Config", None)):
                    if inspect.isclass(kind) and issubclass(kind, Settings) and kind.__module__ == module.__name__:
                        yield kind


@pytest.mark.parametrize("config", dict.fromkeys(configs()), ids=lambda c: f"{c.__module__}.{c.__qualname__}")
def test_every_setting_is_described_by_a_sentence(config):
    for name, field in config.model_fields.items():
        assert field.description and field.description[0].isupper() and field.description.endswith("."), name

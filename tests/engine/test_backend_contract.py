"""What a backend declares is all that the rest knows of it: nobody compares names, and a newcomer is served."""

import ast
import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

import poisonshield
from engine.tiny import losses, train
from poisonshield.engine.backends.plain import Plain
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import refuse_missing
from poisonshield.engine.settings import EngineConfig, backends
from poisonshield.errors import BackendError, ConfigError

PACKAGE = Path(poisonshield.__file__).parent


class Newcomer(Plain):
    """A backend that no other file has heard of."""

    name = "newcomer"
    packages = ("a_package_that_nobody_has",)
    zero_stages = (0, 1)
    drops_steps = False

    @classmethod
    def check(cls, engine):
        if engine.channels_last:
            raise ValueError("newcomer takes no channels_last.")

    def describe(self):
        return f"newcomer with {self.config.zero_stage} pieces"


@pytest.fixture
def newcomer(monkeypatch):
    get, names = backends.get, backends.names
    monkeypatch.setattr(backends, "names", lambda: [*names(), "newcomer"])
    monkeypatch.setattr(backends, "get", lambda name: Newcomer if name == "newcomer" else get(name))


def compared_words(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))


def test_nobody_asks_for_a_backends_name():
    wrong = [
        f"{path.relative_to(PACKAGE)} compares with {word!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != PACKAGE / "engine" / "backends" and "poisonshield.engine" in path.read_text()
        for word in compared_words(ast.parse(path.read_text()))
        if word in backends.names()
    ]
    assert not wrong


def test_search_for_names_finds_one():
    assert list(compared_words(ast.parse("if config.backend == 'plain' and x in ('a',): pass"))) == ["plain", "a"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_stage": 2}, r"zero_stage 2 needs backend: deepspeed; newcomer has stages \(0, 1\)"),
        ({"nonfinite": "skip"}, "nonfinite: skip needs backend: plain; newcomer cannot drop a step whole. Use stop"),
        ({"channels_last": True}, "newcomer takes no channels_last"),
        ({"backend": "plain", "zero_stage": 1}, "zero_stage 1 needs backend: deepspeed or newcomer; plain shards noth"),
    ],
    ids=str,
)
def test_settings_are_held_against_what_a_newcomer_declares(newcomer, settings, words):
    assert EngineConfig(epochs=1, backend="newcomer", zero_stage=1).backend == "newcomer"
    with pytest.raises(ValidationError, match=words):
        EngineConfig(**{"epochs": 1, "backend": "newcomer", **settings})


def test_package_that_a_newcomer_needs_is_asked_for(newcomer):
    with pytest.raises(BackendError, match="a_package_that_nobody_has is asked for and not installed"):
        refuse_missing(EngineConfig(epochs=1, backend="newcomer"))
    refuse_missing(EngineConfig(epochs=1))


def test_newcomer_trains_and_is_announced_by_its_own_words(newcomer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "poisonshield"):
        train(tmp_path / "new", max_steps=2, backend="newcomer", zero_stage=1)
    assert "backend newcomer with 1 pieces, fp32" in caplog.text
    index = json.loads((tmp_path / "new" / "checkpoints" / "step-00000002" / "index.json").read_text())
    assert (index["backend"], index["zero_stage"]) == ("newcomer", 1)
    train(tmp_path / "plain", max_steps=2)
    assert losses(tmp_path / "new") == losses(tmp_path / "plain")


@pytest.mark.parametrize("name", backends.names())
def test_backend_declares_what_it_is(name):
    backend = backends.get(name)
    assert backend.name == name and backend.summary and 0 in backend.zero_stages
    assert set(backend.zero_stages) <= set(range(4)) and {backend.drops_steps, backend.needs_group} <= {True, False}


def test_derived_settings_are_text_that_parses_or_nothing():
    optimizer = OptimConfig(lr=0.1, clip_norm=0.5)
    assert backends.get("plain").derived(EngineConfig(epochs=1), optimizer) is None
    engine = EngineConfig(epochs=1, backend="deepspeed", zero_stage=2)
    title, _, text = backends.get("deepspeed").derived(engine, optimizer).partition("\n")
    made = json.loads(text)
    assert title == "# DeepSpeed gets:"
    assert (made["zero_optimization"]["stage"], made["gradient_clipping"]) == (2, 0.5)
    with pytest.raises(ConfigError, match="lars measures whole tensors"):
        backends.get("deepspeed").derived(engine, OptimConfig(name="lars", lr=0.1))

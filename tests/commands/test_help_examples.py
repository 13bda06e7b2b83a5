"""faults E: what --help gives as an example is taken by the very command that says it."""

import re

import pytest
import typer

from poisonshield.api.names import KINDS
from poisonshield.cli import app
from poisonshield.config.spelled import pick_spelled
from poisonshield.poisons.diffusion.attack.presets import resolve
from poisonshield.registry import Registry
from poisonshield.runs import Experiment, read_experiment
from poisonshield.runs.grid import Grid

PURIFIERS = Registry("poisonshield.defenses", kind="defense")
MASKS = Registry("poisonshield.defenses.diffusion.masks", kind="mask")
DIFFUSION = Registry("poisonshield.defenses.diffusion", kind="defense")


def commands():
    """(name, command) of every command, those of groups too."""
    for name, command in typer.main.get_command(app).commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", found) for inner, found in command.commands.items())
        else:
            yield name, command


HELP = {(name, parameter.name): parameter.help or "" for name, command in commands() for parameter in command.params}


def words_after(text, start):
    return text.partition(start)[2]


@pytest.mark.parametrize("command", ["train", "grid", "poison"])
def test_config_and_overrides(command):
    config = words_after(HELP[command, "config"], "such as ").removesuffix(".")
    overrides = words_after(HELP[command, "overrides"], "e.g. ").split()
    experiment = read_experiment(config, overrides)
    assert overrides and isinstance(experiment, Experiment)
    if command == "grid":
        assert isinstance(experiment, Grid) and len(experiment.cells) % 2 == 0
    if command == "poison":
        assert experiment.poison is not None


def test_overrides_of_a_finished_run():
    experiment = read_experiment("defend/vespr_cifar10_mini")
    overrides = words_after(HELP["evaluate", "overrides"], "e.g. ").split()
    experiment.refuse_changes(overrides)
    assert overrides and read_experiment("defend/vespr_cifar10_mini", overrides)


def test_methods_and_presets_of_protect():
    methods = re.findall(r"[a-z][a-z-]*", words_after(HELP["protect", "method"], "e.g. ").partition(";")[0])
    presets = words_after(HELP["protect", "preset"], "e.g. ").removesuffix(".").split(" or ")
    assert len(methods) >= 5 and len(presets) == 2
    for method in methods:
        assert resolve(method, None, {})
    for preset in presets:
        assert resolve(None, preset, {})


@pytest.mark.parametrize(
    ("command", "parameter", "registries"),
    [
        ("survival", "purifier", (PURIFIERS, DIFFUSION)),
        ("profile", "reference", (PURIFIERS,)),
        ("masks", "mask", (MASKS,)),
    ],
)
def test_spelled_blocks(command, parameter, registries):
    found = re.findall(r"([a-z]+:[0-9a-z.=]+(?:,[a-z]+=[0-9]+)?)", HELP[command, parameter].replace("; ", " "))
    assert found
    for text in found:
        text = text.removesuffix(".")
        registry = next(r for r in registries if text.partition(":")[0] in r.names())
        assert pick_spelled(text, registry)


def test_kinds_of_names():
    kinds = words_after(HELP["names", "kind"], "Such as ").partition(";")[0].split(", ")
    assert set(kinds) <= set(KINDS)

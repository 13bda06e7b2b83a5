"""A recipe that would harm in silence is refused when it is loaded: numbers that are not finite, broken budgets."""

import os

import pytest

from poisonshield.errors import BudgetError, DataError
from poisonshield.poisons.ar import AR
from poisonshield.poisons.class_noise import ClassNoise
from poisonshield.poisons.lsp import LSP
from poisonshield.poisons.regions import Regions
from poisonshield.poisons.release.recipe import load_recipe, read_recipe, save_recipe

NAMES, SIZE = ("a", "b", "c"), (16, 16)
KINDS = [pytest.param(c, id=c.name) for c in (LSP, Regions, ClassNoise, AR)]


def written(cls, path, change=lambda state: None):
    poison = cls(cls.Config(), num_classes=3, image_size=SIZE, seed=1)
    poison.fit(())
    change(poison.state_dict())
    return save_recipe(poison, path, classes=NAMES, data="0" * 64)


def floats(state):
    return [value for value in state.values() if value.is_floating_point()]


@pytest.mark.parametrize("cls", KINDS)
def test_honest_recipe_loads(tmp_path, cls):
    path = written(cls, tmp_path / "p.poison.safetensors")
    assert load_recipe(path, classes=NAMES, image_size=SIZE).name == cls.name


@pytest.mark.parametrize("cls", [Regions, LSP, AR])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, cls, value):
    """faults A: trains to rc 0 on black pictures."""

    def spoil(state):
        floats(state)[-1].view(-1)[3] = value

    path = written(cls, tmp_path / "p.poison.safetensors", spoil)
    with pytest.raises(DataError, match="not finite"):
        read_recipe(path)


def test_pattern_beyond_the_budget_of_its_settings_is_refused(tmp_path):
    """The others scale their patterns to the budget whatever a recipe says."""

    def enlarge(state):
        for value in floats(state):
            value[2].mul_(1.5)  # of the last class alone

    path = written(Regions, tmp_path / "p.poison.safetensors", enlarge)
    with pytest.raises(BudgetError, match="regions changes a picture by linf"):
        load_recipe(path, classes=NAMES, image_size=SIZE)


def test_numbers_so_large_that_sums_overflow_are_refused(tmp_path):
    path = written(AR, tmp_path / "p.poison.safetensors", lambda state: state["taps"].fill_(3e38))
    with pytest.raises(BudgetError):
        load_recipe(path, classes=NAMES, image_size=SIZE)


def test_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "p.poison.safetensors")
    with pytest.raises(DataError, match="no plain file"):
        read_recipe(tmp_path / "p.poison.safetensors")

"""The measured budget states what is there, and notices what should not be there."""

import math

import pytest
import torch

from poisonshield.errors import BudgetError
from poisonshield.poisons.class_noise import ClassNoise
from poisonshield.poisons.lsp import LSP
from poisonshield.poisons.one_pixel import OnePixel
from poisonshield.poisons.regions import Regions
from poisonshield.poisons.release.measured import MeasuredBudget

KINDS = [pytest.param(c, id=c.name) for c in (LSP, Regions, ClassNoise, OnePixel)]


def measure(poison, clean, released):
    budget = MeasuredBudget(poison)
    budget.add(clean, released)
    return budget.record()


@pytest.mark.parametrize("cls", KINDS)
def test_record_equals_plain_sums_over_pixels(cls, mini, built):
    poison = built(cls, mini)
    released = poison.apply(mini).x
    record = measure(poison, mini, released)
    change = ((released.double() - mini.x.double()) * 255).round()
    assert record["linf_levels"] == int(change.abs().max())
    lengths = [math.sqrt(float((c**2).sum())) / 255 for c in change]
    assert record["l2_max"] == pytest.approx(max(lengths), abs=2e-6)
    assert record["l2_mean"] == pytest.approx(sum(lengths) / len(lengths), abs=2e-6)
    assert record["l0_max"] == max(int((c != 0).any(0).sum()) for c in change)
    mse = float((change / 255).square().mean())
    assert record["psnr_db"] == pytest.approx(10 * math.log10(1 / mse), abs=2e-3)


def test_parts_add_up_to_the_whole(mini, built):
    poison = built(LSP, mini)
    released, budget = poison.apply(mini).x, MeasuredBudget(poison)
    for rows in torch.arange(len(mini)).split(333):
        part = mini.replace(keys=tuple(mini.keys[i] for i in rows.tolist()), x=mini.x[rows], y=mini.y[rows])
        budget.add(part, released[rows])
    assert budget.record() == measure(poison, mini, released)


@pytest.mark.parametrize("cls", [pytest.param(c, id=c.name) for c in (LSP, Regions, ClassNoise)])
def test_wrong_eps_is_noticed(cls, mini, built):
    wrong = built(cls, mini, eps=16 / 255).apply(mini).x
    with pytest.raises(BudgetError, match=f"poison {cls.name} allows"):
        measure(built(cls, mini), mini, wrong)


def test_weaker_eps_is_noticed_too(mini, built):
    with pytest.raises(BudgetError, match="are not those of poison regions"):
        measure(built(Regions, mini), mini, built(Regions, mini, eps=4 / 255).apply(mini).x)


@pytest.mark.parametrize("cls", KINDS)
def test_normalized_image_is_noticed(cls, mini, built):
    poison = built(cls, mini)
    released = (poison.apply(mini).x - 0.5) / 0.25
    with pytest.raises(BudgetError, match=r"256 levels in \[0, 1\] were wanted"):
        measure(poison, mini, released)


@pytest.mark.parametrize("cls", KINDS)
def test_transposed_delta_is_noticed_although_its_norm_is_right(cls, mini, built):
    poison = built(cls, mini)
    released = (mini.x + poison.delta(mini).transpose(2, 3)).clamp(0, 1).mul(255).round() / 255
    with pytest.raises(BudgetError):
        measure(poison, mini, released)


def test_delta_of_another_sample_is_noticed(mini, built):
    poison = built(LSP, mini)
    rolled = (mini.x + poison.delta(mini).roll(1, 0)).clamp(0, 1).mul(255).round() / 255
    with pytest.raises(BudgetError, match=f"sample {mini.keys[0]}"):
        measure(poison, mini, rolled)

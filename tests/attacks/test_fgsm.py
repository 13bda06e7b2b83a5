"""FGSM beside other people's, and beside one step of PGD."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_batch
from torch import nn

from poisonshield.attacks import FGSM, PGD, Linf, budget
from poisonshield.random import KeyedRandom, sample_ids

RNG = KeyedRandom(0, sample_ids([f"k{i}" for i in range(6)]))


def problem():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), tiny_batch()
    return model, batch, lambda v: F.cross_entropy(model(v), batch.y, reduction="none")


def test_torchattacks_takes_the_same_step():
    torchattacks = pytest.importorskip("torchattacks")
    model, batch, objective = problem()
    theirs = torchattacks.FGSM(model, eps=8 / 255)(batch.x, batch.y)
    torch.testing.assert_close(FGSM()(objective, batch.x, Linf(8 / 255), RNG), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_is_one_step_of_pgd_as_long_as_the_radius(norm):
    _, batch, objective = problem()
    ball = budget(norm, 0.25)
    one = PGD(steps=1, step_size=0.25, random_start=False)(objective, batch.x, ball, RNG)
    assert torch.equal(FGSM()(objective, batch.x, ball, RNG), one)


def test_step_and_start_may_be_chosen():
    _, batch, objective = problem()
    ball = Linf(0.1)
    start = ball.start_(batch.x.clone(), batch.x, RNG, "fgsm/start")
    ours = FGSM(random_start=True, step_size=0.02)(objective, batch.x, ball, RNG)
    again = FGSM(step_size=0.02)(objective, batch.x, ball, RNG, start=start)
    assert torch.equal(ours, again) and 0 < (ours - start).abs().max() <= 0.02 + 1e-6

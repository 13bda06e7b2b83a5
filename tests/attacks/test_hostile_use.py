"""What attacks and budgets refuse when they are called by hand, in words."""

import pytest
import torch

from poisonshield.attacks import APGD, FGSM, L1, L2, PGD, ChannelLinf, Linf, budget
from poisonshield.errors import BudgetError, GradientError, ShapeError
from poisonshield.random import KeyedRandom, sample_ids

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
RNG = KeyedRandom(0, sample_ids(list("abcd")))


def losses(v):
    return (v * W).sum((1, 2, 3))


@pytest.mark.parametrize("attack", [PGD(steps=2), APGD(steps=2), FGSM()])
@pytest.mark.parametrize(
    ("objective", "x", "start", "error", "words"),
    [
        (losses, X * 255, None, ShapeError, "x reaches from .*\n.*Divide 8-bit levels by 255"),
        (losses, X * 5 - 2, None, ShapeError, "Normalize inside the model"),
        (losses, (X * 255).to(torch.uint8), None, TypeError, "x is torch.uint8"),
        (losses, [1], None, TypeError, "x is a list"),
        (losses, X, X[:2], ShapeError, r"start is torch.float32 \(2, 3, 8, 8\)"),
        (losses, X, 3, ShapeError, "start is a int"),
        (lambda v: losses(v).sum(), X, None, ShapeError, r'gave torch.float32 \(\) for 4.*reduction="none"'),
        (lambda v: losses(v)[:, None], X, None, ShapeError, r"\(4, 1\)"),
        (lambda v: 1.0, X, None, ShapeError, "gave a float"),
        (lambda v: losses(v.detach()), X, None, GradientError, "does not depend on the pixels"),
    ],
)
def test_unfit_pixels_and_objectives_are_refused(attack, objective, x, start, error, words):
    with pytest.raises(error, match=words):
        attack(objective, x, Linf(8 / 255), RNG, start=start)


@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("eps", ["8/255", None, float("inf"), float("nan"), -1, True])
def test_what_is_no_radius_is_refused(kind, eps):
    with pytest.raises(BudgetError, match="is not a radius"):
        kind(eps)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: budget("l0", 1), BudgetError, "'l0' is unknown. Known: linf, l2, l1"),
        (lambda: L1(1, quantile="half"), BudgetError, "not a share"),
        (lambda: ChannelLinf(0.1, (1.0, float("nan"), 1.0)), BudgetError, "positive numbers"),
        (lambda: ChannelLinf(0.1, (1.0, 0.0, 1.0)), BudgetError, "positive numbers"),
        (lambda: PGD(steps=1)(losses, X, ChannelLinf(0.1, (1.0, 1.0)), RNG), ShapeError, "scale has 2 numbers"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("attack", [PGD(steps=2), APGD(steps=2), FGSM()])
def test_an_empty_batch_a_surrounding_no_grad_and_useless_gradients_are_no_trouble(attack):
    nobody = KeyedRandom(0, sample_ids([]))
    assert attack(lambda v: v.sum((1, 2, 3)), X[:0], Linf(0.1), nobody).shape == X[:0].shape
    with torch.no_grad():
        inside = attack(losses, X, Linf(0.1), RNG)
    assert torch.equal(inside, attack(losses, X, Linf(0.1), RNG))
    assert attack(lambda v: losses(v) * float("nan"), X, Linf(0.1), RNG).isfinite().all()

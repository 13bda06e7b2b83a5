"""l1 steps beside foolbox's sparse descent, and what they are worth."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from poisonshield.attacks import L1, PGD
from poisonshield.errors import BudgetError
from poisonshield.random import KeyedRandom, sample_ids


def problem(size=8):
    """A network with a bend, float64, and pictures with many black and white pixels, where steps can get stuck."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 24), nn.Tanh(), nn.Linear(24, 5)).double().eval()
    x = (torch.rand(size, 3, 10, 10, dtype=torch.float64) * 3 - 1).clamp(0, 1)
    y = model(x).argmax(1)
    rng = KeyedRandom(0, sample_ids([f"k{i}" for i in range(size)]))
    return model, x, y, lambda v: F.cross_entropy(model(v), y, reduction="none"), rng


def nearest(delta, radius):
    """The nearest point of the l1 ball by bisection on the threshold, all samples at once."""
    size = delta.abs().flatten(1)
    low, high = torch.zeros(len(size), 1, dtype=delta.dtype), size.amax(1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        outside = (size - middle).clamp(min=0).sum(1, keepdim=True) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    inside = size.sum(1, keepdim=True) <= radius
    return delta.sign() * torch.where(inside, size, (size - high).clamp(min=0)).view_as(delta)


@pytest.mark.parametrize("quantile", [0.9, 0.99, 1.0])
def test_foolbox_takes_the_same_steps(quantile):
    """Its direction, with a projection of our own: foolbox's leaves the ball, which the next test holds."""
    foolbox, ep = pytest.importorskip("foolbox"), pytest.importorskip("eagerpy")
    _, x, _, objective, rng = problem()
    eps, step_size, attack = 6.0, 1.5, foolbox.attacks.SparseL1DescentAttack(quantile=quantile)
    bounds, theirs = foolbox.types.Bounds(0, 1), x.clone()
    for steps in range(1, 21):
        leaf = theirs.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        direction = attack.normalize(ep.astensor(grad), x=ep.astensor(theirs), bounds=bounds).raw
        theirs = (x + nearest(theirs + step_size * direction - x, eps)).clamp(0, 1)
        ours = PGD(steps=steps, step_size=step_size, random_start=False)(objective, x, L1(eps, quantile), rng)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_foolbox_itself_takes_the_same_steps_while_the_ball_is_not_reached():
    """Once it is, foolbox's projection counts one element too many and ends outside, so it is no equal any more."""
    foolbox, ep = pytest.importorskip("foolbox"), pytest.importorskip("eagerpy")
    model, x, y, objective, rng = problem()
    attack = foolbox.attacks.SparseL1DescentAttack(abs_stepsize=0.5, steps=10, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=6.0)
    ours = PGD(steps=10, step_size=0.5, random_start=False)(objective, x, L1(6.0), rng)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    delta = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    beyond = attack.project(ep.astensor(delta), ep.astensor(torch.zeros_like(delta)), 5.0).raw
    assert (L1(5.0).measure(beyond) > 5.001).all() and (L1(5.0).measure(L1(5.0).project(delta)) < 5.001).all()


def largest_alone(objective, x, eps, step_size, steps):
    """The step as it was: all of it on the largest gradient, whether or not that pixel can move."""
    ball, x_adv = L1(eps), x.clone()
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(leaf).sum(), leaf)
        size = grad.abs().flatten(1)
        top = (size == size.amax(1, keepdim=True)).view_as(grad)
        x_adv = (x + ball.project(x_adv + step_size * grad.sign() * top - x)).clamp(0, 1)
    return objective(x_adv)


def test_it_is_stronger_than_spending_all_on_the_largest_gradient():
    _, x, _, objective, rng = problem(32)
    eps, step_size, steps = 6.0, 1.5, 20
    before = largest_alone(objective, x, eps, step_size, steps)
    settings = {"steps": steps, "step_size": step_size, "random_start": False}
    after = objective(PGD(**settings)(objective, x, L1(eps), rng))
    assert (after > before).all() and after.mean() > 1.05 * before.mean()


def test_no_step_is_spent_on_a_pixel_that_cannot_move():
    x = torch.tensor([[1.0, 0.5, 0.0, 0.5]])
    grad = torch.tensor([[3.0, 2.0, -4.0, 1.0]])
    moved = L1(5.0, quantile=1.0).step_(x.clone(), grad, x, 0.25) - x
    torch.testing.assert_close(moved, torch.tensor([[0.0, 0.25, 0.0, 0.0]]))


def test_impossible_quantile_is_refused():
    with pytest.raises(BudgetError, match="quantile 99 is not a share"):
        L1(1.0, quantile=99)

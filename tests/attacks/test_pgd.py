"""PGD and budgets: closed forms, other people's code, and what must not happen."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield.attacks import L1, L2, PGD, Linf, budget, frozen_stats
from poisonshield.errors import BudgetError
from poisonshield.random import KeyedRandom, sample_ids


def rng(size, seed=0):
    return KeyedRandom(seed, sample_ids([f"k{i}" for i in range(size)]))


def linear_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def test_linear_model_reaches_the_corner_of_the_box():
    """On a linear score the best linf point is x + eps sign(w), clipped: a closed form."""
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    out = PGD(steps=10, step_size=0.01)(lambda v: (v * weight).sum((1, 2, 3)), x, Linf(0.05), rng(5))
    torch.testing.assert_close(out, (x + 0.05 * weight.sign()).clamp(0, 1), atol=1e-6, rtol=0)


def test_linear_model_reaches_the_end_of_the_l2_ball():
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.full((5, 3, 8, 8), 0.5)
    out = PGD(steps=60, step_size=0.05)(lambda v: (v * weight).sum((1, 2, 3)), x, L2(0.3), rng(5))
    torch.testing.assert_close(out - x, (0.3 * weight / weight.norm()).expand(5, -1, -1, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_stays_in_the_ball_and_in_pixel_range(norm):
    model, batch = linear_model(), tiny_batch()
    ball = budget(norm, 0.07)
    out = PGD(steps=4, step_size=0.05)(
        lambda v: F.cross_entropy(model(v), batch.y, reduction="none"), batch.x, ball, rng(6)
    )
    assert ball.measure(out - batch.x).max() <= 0.07 + 1e-6
    assert out.min() >= 0 and out.max() <= 1 and not out.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_fills_the_ball(norm):
    ball = budget(norm, 0.1)
    x = torch.full((2000, 1, 1, 2), 0.5)
    size = ball.measure(ball.start_(x.clone(), x, rng(2000), "start") - x)
    assert size.max() <= 0.1 + 1e-7
    assert (size > 0.05).double().mean().item() == pytest.approx(0.75, abs=0.04)  # area outside half the radius


def test_torchattacks_takes_the_same_steps():
    """Without a random start both are the same map; someone else's code is the judge."""
    torchattacks = pytest.importorskip("torchattacks")
    model, batch = linear_model().eval(), tiny_batch()
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)(batch.x, batch.y)
    ours = PGD(steps=10, step_size=2 / 255, random_start=False)(
        lambda v: F.cross_entropy(model(v), batch.y, reduction="none"), batch.x, Linf(8 / 255), rng(6)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_start_follows_the_key_and_not_the_place():
    model, batch = linear_model(), tiny_batch()
    attack = PGD(steps=2, step_size=0.01)

    def run(rows):
        part = KeyedRandom(3, sample_ids([batch.keys[i] for i in rows]))
        return attack(
            lambda v: F.cross_entropy(model(v), batch.y[rows], reduction="none"), batch.x[rows], Linf(0.05), part
        )

    whole = run([0, 1, 2, 3, 4, 5])
    assert torch.equal(run([5, 2]), whole[[5, 2]])
    assert not torch.equal(whole[0] - batch.x[0], whole[1] - batch.x[1])


def test_more_restarts_never_lower_the_loss():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)), tiny_batch()

    def objective(v):
        return F.cross_entropy(model(v), batch.y, reduction="none")

    one = PGD(steps=2, step_size=0.02)(objective, batch.x, Linf(0.1), rng(6))
    five = PGD(steps=2, step_size=0.02, restarts=5)(objective, batch.x, Linf(0.1), rng(6))
    assert (objective(five) >= objective(one)).all() and (objective(five) > objective(one)).any()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_zero_and_nan_gradients_stay_put(norm):
    x, grad = torch.full((3, 1, 2, 2), 0.5), torch.ones(3, 1, 2, 2)
    grad[0] = 0.0
    grad[1] = float("nan")
    moved = budget(norm, 0.1).step_(x.clone(), grad, x, 0.01) - x
    assert moved[:2].abs().max() == 0 and moved[2].min() > 0


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
def test_impossible_radius_is_refused(eps):
    with pytest.raises(BudgetError, match="is not a radius"):
        Linf(eps)


def test_frozen_stats_restores_each_submodule_even_after_an_error():
    encoder = tiny_encoder().train()
    encoder.net[1].eval()
    before = {n: m.training for n, m in encoder.named_modules()}
    with pytest.raises(RuntimeError, match="boom"), frozen_stats(encoder):
        assert not any(m.training for m in encoder.modules())
        raise RuntimeError("boom")
    assert {n: m.training for n, m in encoder.named_modules()} == before


def slow_l1_projection(delta, radius):
    """The nearest point of the l1 ball by bisection on the threshold, one sample at a time, float64."""
    out = []
    for row in delta.double().flatten(1):
        low, high = 0.0, row.abs().max().item()
        if row.abs().sum() <= radius:
            out.append(row)
            continue
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (row.abs() - middle).clamp(min=0).sum() > radius else (low, middle)
        out.append(row.sign() * (row.abs() - high).clamp(min=0))
    return torch.stack(out).view(delta.shape)


def test_l1_projection_is_the_nearest_point():
    delta = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    delta[0] *= 1e-3
    for radius in (0.0, 0.5, 7.0):
        ours = L1(radius).project(delta)
        torch.testing.assert_close(ours.double(), slow_l1_projection(delta, radius), atol=1e-5, rtol=0)


def test_l1_step_spends_its_length_on_the_largest_gradient():
    x = torch.full((2, 3, 2, 2), 0.5)
    grad = torch.zeros_like(x)
    grad[0, 0, 0, 0], grad[0, 1, 0, 0], grad[0, 2, 0, 0] = 2.0, -2.0, 1.0
    moved = L1(10.0).step_(x.clone(), grad, x, 0.2) - x
    expected = torch.zeros_like(x)
    expected[0, 0, 0, 0], expected[0, 1, 0, 0] = 0.1, -0.1
    torch.testing.assert_close(moved, expected)


def test_of_several_restarts_the_first_accepted_point_is_kept_whatever_its_loss():
    x = torch.full((40, 1, 1, 1), 0.5)
    height = lambda v: v.flatten(1).sum(1)
    low = PGD(steps=0, restarts=4)(height, x, Linf(0.5), rng(40), success=lambda v: height(v) < 0.5)
    first, high = (PGD(steps=0, restarts=r)(height, x, Linf(0.5), rng(40)) for r in (1, 4))
    share = (height(low) < 0.5).double().mean().item()
    assert share == pytest.approx(1 - 0.5**4, abs=0.12) and (height(high) > 0.5).double().mean() > 0.8
    assert torch.equal(low[height(first) < 0.5], first[height(first) < 0.5])

"""Barlow Twins, VICReg and MEC in their corrected forms against others' code, and against slow loops in float64."""

import pytest
import torch
from losses.golden import golden

from poisonshield.errors import ShapeError
from poisonshield.losses.barlow import barlow
from poisonshield.losses.mec import mec
from poisonshield.losses.pairs import pairs
from poisonshield.losses.vicreg import vicreg


def drawn(views=2, shape=(9, 5), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(views))


def test_barlow_equals_lightlys():
    lightly = pytest.importorskip("lightly.loss")
    a, b = drawn()
    theirs = lightly.BarlowTwinsLoss(lambda_param=5e-3)(a, b)
    assert barlow((a, b), symmetrized=False).item() == pytest.approx(theirs.item(), rel=1e-9)


def test_barlow_counts_both_triangles():
    a, b = drawn()
    off_only = barlow((a, b), off_diagonal=1.0, symmetrized=False) - barlow((a, b), off_diagonal=0.0, symmetrized=False)
    za, zb = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b))
    slow = sum((za[:, d] @ zb[:, e] / len(a)).item() ** 2 for d in range(5) for e in range(5) if d != e)
    assert off_only.item() == pytest.approx(slow, rel=1e-9)


def test_vicreg_equals_lightlys():
    lightly = pytest.importorskip("lightly.loss")
    a, b = drawn()
    theirs = lightly.VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)(a, b)
    assert vicreg((a, b), symmetrized=False).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(4, 7), (9, 5)])
def test_mec_equals_powers_of_the_full_matrix(shape):
    a, b = drawn(shape=shape)
    size, width = shape
    za, zb = (z / z.norm(dim=1, keepdim=True) for z in (a, b))
    matrix = za @ zb.T / (size * 0.06)
    series = sum((-1) ** (k + 1) * torch.linalg.matrix_power(matrix, k).trace() / k for k in range(1, 5))
    length = -0.5 * (size + width) * series.item()
    assert mec((a, b), symmetrized=False, coding_length=True).item() == pytest.approx(length, rel=1e-9)
    assert mec((a, b), symmetrized=False).item() == pytest.approx(-0.06 * series.item(), rel=1e-9)


@pytest.mark.parametrize("loss", [barlow, vicreg, mec])
def test_gradients_are_right(loss):
    a, b = (z.requires_grad_() for z in drawn(shape=(6, 4)))
    assert torch.autograd.gradcheck(lambda a, b: loss((a, b)), (a, b))


@pytest.mark.parametrize("loss", [barlow, vicreg, mec])
def test_equal_views_of_independent_columns_cost_least(loss):
    q, _ = torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    good = 4 * (q - q.mean(0))
    collapsed = torch.ones(16, 4, dtype=torch.float64) + 1e-3 * good
    assert loss((good, good)) < loss((collapsed, collapsed))


def test_pairs_of_small_crops_ask_the_large_ones_only():
    views, _ = golden(3)
    assert pairs(views, views[:2]) == [(0, 1), (1, 0), (2, 0), (2, 1)]
    assert pairs(views, views, symmetrized=False) == [(0, 1), (0, 2)]
    with pytest.raises(ShapeError, match="1 online and 1 target"):
        pairs(views[:1], views[:1])
    with pytest.raises(ShapeError, match="2 online and 3 target"):
        pairs(views[:2], views)


@pytest.mark.parametrize("loss", ["infonce", "negative_cosine", "barlow", "vicreg", "mec", "dino"])
def test_half_precision_run_does_not_reach_the_losses_products(loss):
    """Under autocast, on half-precision projections, a loss is that of the same numbers in float32."""
    from poisonshield.losses import barlow, cosine, dino, infonce, mec, vicreg

    functions = {f.__name__: f for f in (infonce.infonce, barlow.barlow, vicreg.vicreg, mec.mec)}
    functions["negative_cosine"] = lambda p: cosine.negative_cosine(p, p)
    functions["dino"] = lambda p: dino.dino(p, p, torch.zeros(5))
    draw = torch.Generator().manual_seed(0)
    half = tuple(torch.randn(9, 5, generator=draw).bfloat16().requires_grad_() for _ in range(2))
    full = tuple(z.detach().float().requires_grad_() for z in half)
    with torch.autocast("cpu", torch.bfloat16):
        ours = functions[loss](half)
    theirs = functions[loss](full)
    assert ours.dtype == torch.float32 and ours.item() == theirs.item()
    ours.backward()
    theirs.backward()
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(a.grad, b.grad.bfloat16())

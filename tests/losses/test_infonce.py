"""NT-Xent against lightly and a slow loop in float64, and its edge cases."""

import math

import pytest
import torch

from poisonshield.errors import ShapeError
from poisonshield.losses.infonce import infonce


def slow(p, m, temperature):
    """The formula of the docstring, one scalar at a time, in float64."""

    def s(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b)) / temperature

    p, m = [t.double().tolist() for t in p], [t.double().tolist() for t in m]
    count, total = len(p[0]), 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if i == j:
                continue
            for n in range(count):
                below = sum(math.exp(s(p[i][n], m[j][k])) for k in range(count))
                below += sum(math.exp(s(p[i][n], m[i][k])) for k in range(count) if k != n)
                total += (-s(p[i][n], m[j][n]) + math.log(below)) / count
    return total / (len(p) * (len(p) - 1))


@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (7, 13)])
@pytest.mark.parametrize("views", [2, 4])
def test_matches_a_slow_loop(shape, views):
    generator = torch.Generator().manual_seed(1)
    z = tuple(torch.randn(shape, generator=generator) for _ in range(views))
    assert infonce(z, temperature=0.3).item() == pytest.approx(slow(z, z, 0.3), rel=1e-5)


def test_low_temperature_does_not_overflow():
    z = (torch.eye(4), torch.eye(4))
    assert torch.isfinite(infonce(z, temperature=0.005))


def test_gradient_scales_with_what_comes_from_above():
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    grads = []
    for factor in (1.0, -3.0):
        leaf = z.clone().requires_grad_()
        (factor * infonce((leaf, leaf.roll(1, 1)))).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], -3 * grads[0])


def test_one_view_and_unequal_views_are_refused():
    with pytest.raises(ShapeError, match="at least two online views"):
        infonce((torch.ones(2, 3),))
    with pytest.raises(ShapeError, match=r"\(2, 3\), \(3, 3\)"):
        infonce((torch.ones(2, 3), torch.ones(3, 3)))


def test_two_views_equal_lightlys_nt_xent():
    lightly = pytest.importorskip("lightly.loss")
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(11, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    theirs = lightly.NTXentLoss(temperature=0.2)(a, b)
    assert infonce((a, b), temperature=0.2).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_small_crops_may_ask_large_ones():
    draw = torch.Generator().manual_seed(2)
    p = tuple(torch.randn(5, 4, generator=draw) for _ in range(4))
    assert torch.isfinite(infonce(p, p[:2], same_view="none"))
    with pytest.raises(ShapeError, match="same_view 'none'"):
        infonce(p, p[:2])


@pytest.mark.parametrize("same_view", ["none", "others", "all"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_gradient_is_right(same_view, margin):
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: infonce((a, b), same_view=same_view, margin=margin), (a, b))

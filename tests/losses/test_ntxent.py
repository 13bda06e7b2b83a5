"""NT-Xent against golden values, a slow loop in float64, and its edge cases."""

import math

import pytest
import torch

from poisonshield.errors import ShapeError
from poisonshield.losses.ntxent import ntxent


def golden(views):
    """The fixed inputs of the reference table: online P and target M, [4, 6] per view."""
    p, m = [], []
    for v in range(views):
        p.append(
            torch.tensor(
                [[math.sin(1.3 * n + 0.7 * d + 0.5 * v + 0.2 * n * d) for d in range(6)] for n in range(4)],
                dtype=torch.float64,
            )
        )
        m.append(
            torch.tensor(
                [[math.cos(0.9 * n - 0.4 * d + 0.3 * v + 0.1 * n * d) for d in range(6)] for n in range(4)],
                dtype=torch.float64,
            )
        )
    return tuple(p), tuple(m)


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


@pytest.mark.parametrize(("views", "value"), [(2, 1.582173540), (3, 1.608507361)])
def test_golden_values_of_the_reference_table(views, value):
    p, m = golden(views)
    assert ntxent(p, m, temperature=0.2).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (7, 13)])
@pytest.mark.parametrize("views", [2, 4])
def test_matches_a_slow_loop(shape, views):
    generator = torch.Generator().manual_seed(1)
    z = tuple(torch.randn(shape, generator=generator) for _ in range(views))
    assert ntxent(z, temperature=0.3).item() == pytest.approx(slow(z, z, 0.3), rel=1e-5)


def test_low_temperature_does_not_overflow():
    z = (torch.eye(4), torch.eye(4))
    assert torch.isfinite(ntxent(z, temperature=0.005))


def test_gradient_scales_with_what_comes_from_above():
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    grads = []
    for factor in (1.0, -3.0):
        leaf = z.clone().requires_grad_()
        (factor * ntxent((leaf, leaf.roll(1, 1)))).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], -3 * grads[0])


def test_one_view_and_unequal_views_are_refused():
    with pytest.raises(ShapeError, match="two or more views"):
        ntxent((torch.ones(2, 3),))
    with pytest.raises(ShapeError, match=r"\(2, 3\), \(3, 3\)"):
        ntxent((torch.ones(2, 3), torch.ones(3, 3)))

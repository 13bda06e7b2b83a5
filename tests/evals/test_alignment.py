"""Every measure of two views against loops in float64."""

import math

import numpy
import pytest
import torch

from poisonshield.errors import ShapeError
from poisonshield.evals import alignment as module
from poisonshield.evals.alignment import alignment, eigen_alignment

TOLERANCE = 1e-9


def views(n=9, d=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    a = 3 * torch.randn(n, d, generator=generator, dtype=dtype) + 1
    return a, a + 0.7 * torch.randn(n, d, generator=generator, dtype=dtype)


def slow(a, b):
    """Plain Python floats, one pair at a time."""

    def unit(rows):
        return [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows.double().tolist()]

    def dot(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True))

    a, b = unit(a), unit(b)
    n, d = len(a), len(a[0])
    same = [dot(a[i], b[i]) for i in range(n)]
    other = [dot(a[i], b[k]) for i in range(n) for k in range(n) if i != k]
    columns = [[row[c] for row in a] for c in range(d)]
    means = [sum(c) / n for c in columns]
    off = [abs(dot(columns[c], columns[e])) / n for c in range(d) for e in range(c + 1, d)]
    rows = a + b
    loss = 0.0
    for i in range(2 * n):
        denominator = sum(math.exp(dot(rows[i], rows[k])) for k in range(2 * n) if k != i)
        loss -= math.log(math.exp(dot(rows[i], rows[(i + n) % (2 * n)])) / denominator) / (2 * n)
    return {
        "positive_cosine": sum(same) / n,
        "negative_cosine": sum(other) / len(other),
        "positive_concentration": sum(math.exp(4 * c - 4) for c in same) / n,
        "negative_concentration": sum(math.exp(4 * c - 4) for c in other) / len(other),
        "variance": sum(sum((v - m) ** 2 for v in c) / n for c, m in zip(columns, means, strict=True)) / d,
        "correlation_strength": sum(off) / len(off),
        "mutual_information": math.log(2 * n - 1) - loss,
        "eigen_alignment": slow_eigen(numpy.array(a), numpy.array(b), d),
    }


def slow_eigen(p, z, top):
    values, vectors = numpy.linalg.eigh(z.T @ z / len(z))
    c, cosines = p.T @ p / len(p), []
    for i in numpy.argsort(-values)[:top]:
        v = vectors[:, i]
        cosines.append(v @ c @ v / (numpy.linalg.norm(c @ v) * numpy.linalg.norm(v)))
    return float(numpy.mean(cosines))


@pytest.mark.parametrize("block", [4, 1024])
def test_every_measure_equals_a_loop(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    a, b = views()
    ours, theirs = alignment(a, b), slow(a, b)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], abs=TOLERANCE), name


def test_mutual_information_is_below_its_ceiling_and_zero_for_a_collapsed_encoder():
    # Identical rows everywhere: the partner is one of 2n - 1 equal candidates, so nothing is known.
    ones = torch.ones(6, 3)
    assert alignment(ones, ones)["mutual_information"] == pytest.approx(0.0, abs=TOLERANCE)
    axes = torch.eye(40)
    value = alignment(axes, axes)["mutual_information"]
    assert value == pytest.approx(math.log(79) - (math.log(math.e + 78) - 1), abs=TOLERANCE)
    assert 0 < value < 2


def test_top_eigenvectors_only():
    p, z = views(30, 6)
    unit_p, unit_z = (torch.nn.functional.normalize(h, dim=1).numpy() for h in (p, z))
    assert eigen_alignment(p, z, top=2) == pytest.approx(slow_eigen(unit_p, unit_z, 2), abs=TOLERANCE)


def test_the_same_view_is_aligned_with_itself_even_with_unused_directions():
    a = torch.cat([views(30, 4)[0], torch.zeros(30, 3)], 1)
    out = alignment(a, a)
    assert out["eigen_alignment"] == pytest.approx(1.0, abs=1e-6)
    assert out["positive_cosine"] == pytest.approx(1.0, abs=TOLERANCE)


def test_inputs_stay_as_they_are():
    a, b = views()
    before = a.clone(), b.clone()
    alignment(a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("shapes", [((3, 4), (4, 4)), ((1, 4), (1, 4)), ((3, 4, 1), (3, 4, 1))])
def test_views_that_do_not_match_are_refused(shapes):
    with pytest.raises(ShapeError, match=r"two of \[n, D\] with n > 1"):
        alignment(torch.ones(shapes[0]), torch.ones(shapes[1]))

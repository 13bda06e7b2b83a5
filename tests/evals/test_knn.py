"""The weighted vote against a loop in float64, and against scikit-learn."""

import math

import pytest
import torch

from poisonshield.evals.knn import knn
from poisonshield.evals.parts.features import Features


def features(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 5
    centres = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    return Features(centres[y] + 1.3 * torch.randn(count, 7, generator=generator), y)


def slow_weighted(train, test, k, temperature):
    """One query at a time, one neighbour at a time."""
    right = 0
    for h, y in zip(test.h.double(), test.y.tolist(), strict=True):
        cosines = [float(h @ b / (h.norm() * b.norm())) for b in train.h.double()]
        votes = {}
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            label = int(train.y[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosines[i] / temperature)
        right += max(votes, key=votes.get) == y
    return 100 * right / len(test.y)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 20])
def test_weighted_vote_equals_a_loop(k, temperature):
    train, test = features(150, 0), features(80, 1)
    ours = knn(train, test, k=k, num_classes=5, weighted=True, temperature=temperature)
    assert ours == pytest.approx(slow_weighted(train, test, k, temperature), abs=1e-9)


def test_weighted_vote_equals_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, test = features(300, 2), features(200, 3)
    import numpy

    judge = neighbors.KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: numpy.exp((1 - distance) / 0.07)
    ).fit(train.h.double(), train.y)
    theirs = 100 * judge.score(test.h.double(), test.y)
    assert knn(train, test, k=20, num_classes=5, weighted=True) == pytest.approx(theirs, abs=1e-9)


def test_one_near_neighbour_outweighs_two_far_ones_only_when_weighted():
    train = Features(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1]))
    query = Features(torch.tensor([[1.0, 0.05]]), torch.tensor([0]))
    assert knn(train, query, k=3, num_classes=2) == 0.0
    assert knn(train, query, k=3, num_classes=2, weighted=True) == 100.0


def test_inputs_stay_as_they_are():
    train, test = features(60, 0), features(30, 1)
    before = train.h.clone(), test.h.clone()
    knn(train, test, num_classes=5, weighted=True)
    assert torch.equal(train.h, before[0]) and torch.equal(test.h, before[1])

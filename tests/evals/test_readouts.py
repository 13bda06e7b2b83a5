"""k-NN, linear probe, classifier and robust accuracy against other people's code and closed forms."""

import pytest
import torch
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield.attacks import PGD, Linf
from poisonshield.batch import Batch
from poisonshield.evals.classifier import classifier
from poisonshield.evals.knn import knn
from poisonshield.evals.linear import linear
from poisonshield.evals.parts.features import Features, extract
from poisonshield.evals.robust import robust
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised


def blobs(count, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)) * 1.2
    y = torch.arange(count) % 4
    return Features(centres[y] + spread * torch.randn(count, 6, generator=generator), y)


def test_knn_equals_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, test = blobs(300, 0), blobs(200, 1)
    # k = 1 has no ties to break, so the two must agree to the sample.
    judge = neighbors.KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(train.h, train.y)
    assert knn(train, test, k=1, num_classes=4) == pytest.approx(100 * judge.score(test.h, test.y))


def test_knn_breaks_ties_by_similarity_and_votes_first():
    h = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3], [0.7, 0.3]])
    train = Features(h, torch.tensor([0, 1, 1, 2, 2]))
    query = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn(train, query, k=2, num_classes=3) == 100.0  # a tie of 0 and 1: 0 is nearer
    assert knn(train, query, k=4, num_classes=3) == 0.0  # two votes for 2 beat one nearer vote


def test_knn_takes_a_bank_smaller_than_k():
    train, test = blobs(8, 0), blobs(40, 1)
    assert knn(train, test, k=20, num_classes=4) == knn(train, test, k=8, num_classes=4) > 25


def test_linear_probe_equals_scikit_learns():
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, test = blobs(400, 0, 1.5), blobs(300, 1, 1.5)
    scale = preprocessing.StandardScaler().fit(train.h)
    # scikit-learn minimises sum of losses + |w|^2 / (2 C); ours is the mean, so C = 1 / (N * weight_decay).
    judge = sklearn_linear.LogisticRegression(C=1 / (400 * 1e-2), max_iter=2000, tol=1e-8).fit(
        scale.transform(train.h), train.y
    )
    theirs = 100 * judge.score(scale.transform(test.h), test.y)
    assert linear(train, test, num_classes=4, weight_decay=1e-2) == pytest.approx(theirs, abs=1.0)  # std by n or n - 1


def test_linear_probe_repeats_exactly_and_survives_dead_features():
    train = blobs(100, 0)
    train = Features(torch.cat([train.h, torch.zeros(100, 1)], 1), train.y)
    values = {linear(train, train, num_classes=4) for _ in range(2)}
    assert len(values) == 1 and values.pop() > 50


def test_features_come_in_order_and_the_mode_is_restored():
    encoder = tiny_encoder().train()
    batches = [tiny_batch(5, seed=0), tiny_batch(3, seed=1)]
    before = encoder.net[1].running_mean.clone()
    out = extract(encoder, batches)
    assert encoder.training and torch.equal(encoder.net[1].running_mean, before)
    encoder.eval()
    torch.testing.assert_close(out.h, torch.cat([encoder(b.x) for b in batches]).detach())
    assert out.y.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]


class Threshold(nn.Module):
    """Score of class 1 is the mean pixel above 0.5: its robust accuracy is known."""

    feature_dim = 1

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] - 0.5


def threshold_method():
    method = Supervised(Supervised.Config(), encoder=Threshold(), num_classes=2)
    with torch.no_grad():
        method.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        method.head.bias.zero_()
    return method


def threshold_batch():
    level = torch.tensor([0.2, 0.44, 0.48, 0.53, 0.57, 0.9])
    x = level.view(-1, 1, 1, 1).expand(6, 3, 4, 4).contiguous()
    return Batch(tuple("abcdef"), x, None, (level > 0.5).long())


def test_classifier_and_robust_accuracy_of_a_known_threshold():
    method, batch = threshold_method(), threshold_batch()
    assert classifier(method, [batch]) == 100.0

    def attacked(eps, count):
        attack = PGD(steps=5, step_size=0.02)
        return robust(method, [batch], attack, Linf(eps), max_samples=count, seed=0)

    # A shift of 0.05 flips exactly the two samples within 0.05 of the threshold.
    assert attacked(0.05, 6) == pytest.approx(100 * 4 / 6)
    assert attacked(0.0, 6) == 100.0
    assert attacked(0.05, 3) == pytest.approx(100 * 2 / 3)


def test_method_without_a_classifier_has_no_accuracy():
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4)
    assert classifier(method, [tiny_batch()]) is None
    assert robust(method, [tiny_batch()], PGD(steps=1), Linf(0.1), max_samples=6, seed=0) is None

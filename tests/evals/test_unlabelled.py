"""Images without labels, no test images, and classes that one side lacks: what is measured, and what is left out."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from tiny import tiny_batch, tiny_encoder

from poisonshield.attacks import PGD, Linf
from poisonshield.batch import Batch
from poisonshield.errors import ConfigError, DataError
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.base import Subject
from poisonshield.evals.classifier import classifier
from poisonshield.evals.knn import knn
from poisonshield.evals.linear import linear, linear_sweep
from poisonshield.evals.lipschitz import local_lipschitz
from poisonshield.evals.parts.features import Features, extract
from poisonshield.evals.parts.numbers import measure, row_of, values_of
from poisonshield.evals.parts.settings import EvaluateConfig
from poisonshield.evals.robust import robust
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised

OF_LABELS = {"classifier", "knn", "linear", "robust"}
OF_TEST_IMAGES = {"knn", "linear", "robust", "lipschitz"}
EVERYTHING = EvaluateConfig.model_validate({name: True for name in ("lipschitz", "pairs")})


class OneSet:
    """Samples of so many classes, the same in every form."""

    def __init__(self, classes, tested=True):
        batch = tiny_batch(12, classes=classes)
        self.batch, self.tested = Batch(batch.keys, batch.x, y=batch.y), tested

    def test(self, count=None):
        return iter((self.batch,) if self.tested else ())

    def train(self, count=None):
        return iter((self.batch,))

    clean = crops = train

    def augmented(self, count=None, *, view=0):
        return iter((self.batch.replace(x=(self.batch.x + 0.1 * view).clamp(0, 1)),))


def subject(classes=1, tested=True, **more):
    torch.manual_seed(0)
    cls = Supervised if classes > 1 else SimCLR
    config = cls.Config() if classes > 1 else cls.Config(hidden=8, out=8)
    method = cls(config, encoder=tiny_encoder(), num_classes=classes).eval()
    return Subject(method, OneSet(classes, tested), num_classes=classes, tested=tested, **more)


def test_images_of_one_class_get_no_accuracy_and_the_log_says_why(caplog):
    """D: unlabelled images for self-supervision. k-NN and the linear probe said 100 %."""
    with caplog.at_level(logging.WARNING):
        measured = measure(subject(), EVERYTHING, EVALUATIONS)
    assert {name for name in OF_LABELS if measured[name] is None} == OF_LABELS
    assert measured["spectrum"]["effective_rank"] > 1 and measured["alignment"]["positive_cosine"] > 0
    told = [r.message for r in caplog.records if "one class" in r.message]
    assert len(told) == 1 and "left out (classifier, knn, linear, robust)" in told[0]
    assert "images without labels" in told[0]


def test_without_test_images_what_needs_them_is_left_out_and_the_rest_is_measured(caplog):
    """D: unlabelled images, no test set."""
    with caplog.at_level(logging.WARNING):
        unlabelled = measure(subject(tested=False), EVERYTHING, EVALUATIONS)
        labelled = measure(subject(classes=4, tested=False), EVERYTHING, EVALUATIONS)
    for measured in (unlabelled, labelled):
        assert all(measured[name] is None for name in OF_TEST_IMAGES)
        assert measured["spectrum"] and measured["alignment"]
    assert labelled["classifier"]["test_top1"] is None and labelled["classifier"]["train_top1"] >= 0
    assert any("set data.test" in r.message for r in caplog.records)
    assert row_of(labelled, EVALUATIONS)["knn_top1"] is None and json.dumps(labelled)


def test_with_labels_and_test_images_nothing_is_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        measured = measure(subject(classes=4), EvaluateConfig(), EVALUATIONS)
    assert all(measured[name] is not None for name in OF_LABELS | {"spectrum", "alignment"})
    assert not [r for r in caplog.records if "left out" in r.message]


def test_what_is_not_finite_is_null_and_told(caplog):
    broken = subject(classes=4)
    with torch.no_grad():
        broken.method.encoder.net[0].weight.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        measured = measure(broken, EVERYTHING, EVALUATIONS)
    values = values_of(measured, EVALUATIONS)
    assert values["positive_cosine"] is values["knn_top1"] is values["linear_top1"] is values["lipschitz_raw"] is None
    assert all(v is None or v == v for v in values.values())
    told = [r.message for r in caplog.records]
    assert "left out (knn): features of 12 of 12 samples are not finite." in told
    assert any("lipschitz_raw" in words and "nan" in words for words in told)


def separable(classes, count=6, seed=0):
    """Features that a class shares but for some noise, of the given classes."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes).repeat_interleave(count)
    return Features(torch.eye(5)[y] * 4 + torch.randn(len(y), 5, generator=rng) * 0.1, y)


@pytest.mark.parametrize(
    ("train", "test", "right"),
    [
        ([0, 1, 2, 3, 4], [0, 3], 100.0),  # the test images lack classes
        ([0, 1, 3], [0, 1, 3], 100.0),  # both do
        ([0, 1], [0, 1, 2, 3], 50.0),  # what was never trained on cannot be right
        ([2], [2], 100.0),
    ],
)
def test_either_side_may_lack_classes(train, test, right):
    """D: a validation split that lacks a class."""
    a, b = separable(train), separable(test, seed=1)
    assert knn(a, b, num_classes=5, k=3) == pytest.approx(right)
    assert linear(a, b, num_classes=5) == pytest.approx(right)
    (swept,) = linear_sweep(a, b, num_classes=5, learning_rates=[0.1], epochs=5).values()
    assert swept == pytest.approx(right)


def test_one_training_sample_is_enough_for_numbers_that_are_finite():
    one = Features(torch.ones(1, 5), torch.tensor([1]))
    assert knn(one, one, num_classes=2) == linear(one, one, num_classes=2) == 100.0


NOTHING = Features(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
SOME = separable([0, 1])


@pytest.mark.parametrize("probe", [knn, linear, lambda a, b, **k: linear_sweep(a, b, learning_rates=[0.1], **k)])
@pytest.mark.parametrize(
    ("train", "test", "classes", "words"),
    [
        (NOTHING, SOME, 2, "no training samples"),
        (SOME, NOTHING, 2, "no test samples"),
        (separable([0, 4]), SOME, 2, "labels of training samples reach from 0 to 4; there are 2 classes"),
        (SOME, separable([2]), 2, "labels of test samples reach from 2 to 2"),
        (SOME, replace(SOME, y=SOME.y - 1), 2, "from -1 to 0"),
    ],
)
def test_probes_refuse_what_they_cannot_count(probe, train, test, classes, words):
    with pytest.raises(DataError, match=words):
        probe(train, test, num_classes=classes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: knn(SOME, SOME, num_classes=2, k=0), "k 0"),
        (lambda: knn(SOME, SOME, num_classes=2, weighted=True, temperature=0), "temperature 0"),
        (lambda: linear(SOME, SOME, num_classes=2, weight_decay=-1), "weight_decay -1"),
        (lambda: linear_sweep(SOME, SOME, num_classes=2, learning_rates=[0.0]), "a learning rate 0.0"),
        (lambda: linear_sweep(SOME, SOME, num_classes=2, learning_rates=[0.1], epochs=0), "epochs 0"),
    ],
)
def test_settings_that_configs_refuse_are_refused_by_hand_too(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_no_samples_have_no_number():
    method = subject(classes=4).method
    assert classifier(method, []) is None
    assert robust(method, [], PGD(steps=1), Linf(0.1), seed=0) is None
    with pytest.raises(DataError, match="no samples"):
        extract(method.encoder, [])
    with pytest.raises(DataError, match="no samples"):
        local_lipschitz(method.encoder, [])


def test_supervised_training_on_one_class_is_refused_with_a_method_that_does():
    with pytest.raises(ConfigError, match="method.name: simclr"):
        Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=1)

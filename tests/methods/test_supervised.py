"""Supervised training: what it asks of a batch."""

import pytest
import torch
from tiny import tiny_batch, tiny_encoder

from poisonshield.errors import ConfigError, DataError
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised


def test_samples_without_labels_are_refused_by_name():
    method = Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=4)
    batch = tiny_batch(3, views=1)
    assert torch.isfinite(method(batch).loss)
    with pytest.raises(DataError, match="s0 comes without a label"):
        method(batch.replace(y=None))


def test_class_scores_of_a_method_without_a_classifier_are_refused():
    x, settings = tiny_batch(3).x, {"encoder": tiny_encoder(), "num_classes": 4}
    supervised = Supervised(Supervised.Config(), **settings).eval()
    assert torch.equal(supervised.scores(x), supervised.logits(x))
    with pytest.raises(ConfigError, match="simclr has no classifier"):
        SimCLR(SimCLR.Config(hidden=8, out=4), **settings).scores(x)

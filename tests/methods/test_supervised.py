"""Supervised training: what it asks of a batch."""

import pytest
import torch
from tiny import tiny_batch, tiny_encoder

from poisonshield.errors import DataError
from poisonshield.methods.supervised import Supervised


def test_samples_without_labels_are_refused_by_name():
    method = Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=4)
    batch = tiny_batch(3, views=1)
    assert torch.isfinite(method(batch).loss)
    with pytest.raises(DataError, match="s0 comes without a label"):
        method(batch.replace(y=None))

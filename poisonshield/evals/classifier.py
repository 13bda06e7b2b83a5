"""Accuracy of the classifier that came out of training, on clean images."""

from collections.abc import Iterable

import torch

from poisonshield.batch import Batch
from poisonshield.method import Method


@torch.no_grad()
def classifier(method: Method, batches: Iterable[Batch]) -> float | None:
    """Top-1 accuracy in percent of `method.logits`, evaluation mode; None for a method without a classifier."""
    training = method.training
    method.eval()
    right = total = 0
    try:
        for batch in batches:
            scores = method.logits(batch.x.contiguous(memory_format=torch.channels_last))
            if scores is None:
                return None
            right += int((scores.argmax(1) == batch.y).sum())
            total += len(batch)
    finally:
        method.train(training)
    return 100.0 * right / total

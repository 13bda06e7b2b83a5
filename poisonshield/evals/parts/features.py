"""Frozen features of a whole data set, computed once and shared by the probes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poisonshield.batch import Batch


@dataclass(frozen=True)
class Features:
    """h float32 [N, D] and y int64 [N]."""

    h: Tensor
    y: Tensor


@torch.no_grad()
def extract(encoder: nn.Module, batches: Iterable[Batch]) -> Features:
    """Features of every sample, evaluation mode; the encoder's mode is restored."""
    training = encoder.training
    encoder.eval()
    try:
        labelled = (pixels_and_labels(batch) for batch in batches)
        pairs = [(encoder(x.contiguous(memory_format=torch.channels_last)).float(), y) for x, y in labelled]
    finally:
        encoder.train(training)
    return Features(torch.cat([h for h, _ in pairs]), torch.cat([y for _, y in pairs]))


def pixels_and_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """x [B, 3, H, W] and y [B] of a batch. Raises DataError for a batch without them."""
    return batch.pixels(), batch.labels()

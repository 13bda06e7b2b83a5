"""Frozen features of a whole data set, computed once and shared by the probes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poisonshield.batch import Batch
from poisonshield.errors import DataError


@dataclass(frozen=True)
class Features:
    """h float32 [N, D] and y int64 [N]."""

    h: Tensor
    y: Tensor


class NotFinite(DataError):
    """Features that hold NaN or infinity, which no number describes."""


def check_features(train: Features, test: Features, num_classes: int) -> None:
    """Raises DataError for an empty side, or a label outside the classes. Either side may lack some of them."""
    for name, features in (("training", train), ("test", test)):
        if not len(features.y):
            raise DataError(f"there are no {name} samples to measure an accuracy with.")
        first, last = (int(v) for v in features.y.aminmax())
        if first < 0 or last >= num_classes:
            raise DataError(f"labels of {name} samples reach from {first} to {last}; there are {num_classes} classes.")


@torch.no_grad()
def extract(encoder: nn.Module, batches: Iterable[Batch]) -> Features:
    """Features of every sample, evaluation mode; the encoder's mode is restored. Raises DataError for no samples,
    NotFinite for features that are not.
    """
    training = encoder.training
    encoder.eval()
    try:
        labelled = (pixels_and_labels(batch) for batch in batches)
        pairs = [(encoder(x.contiguous(memory_format=torch.channels_last)).float(), y) for x, y in labelled]
    finally:
        encoder.train(training)
    if not pairs:
        raise DataError("there are no samples to take features of.")
    h = torch.cat([h for h, _ in pairs])
    if not bool(h.isfinite().all()):
        raise NotFinite(f"features of {int((~h.isfinite().all(1)).sum())} of {len(h)} samples are not finite")
    return Features(h, torch.cat([y for _, y in pairs]))


def pixels_and_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """x [B, 3, H, W] and y [B] of a batch. Raises DataError for a batch without them."""
    return batch.pixels(), batch.labels()

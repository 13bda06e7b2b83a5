"""Samples by index, wherever they live: a ShardSet reads its tars each time, a ResidentSource decoded them once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.ahead import Reach
from poisonshield.errors import DataError

Place = tuple[int, int, Tensor]
"""Epoch, step, and the numbers of the samples that are read there, int64 [b]."""


class BadSample(DataError):
    """The image of one sample cannot be read, or has another size than the manifest's."""


class Source(Protocol):
    """N samples that can be read in any order; two sources of one data set give the same bytes.

    keys: N names. ids, labels, shard: int64 [N]. image_size: (H, W). digest: the data set's, in hexadecimal.
    """

    classes: tuple[str, ...]
    image_size: tuple[int, int] | None
    digest: str
    bad_limit: int

    def __len__(self) -> int: ...

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def ids(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def shard(self) -> Tensor: ...

    @property
    def counts(self) -> tuple[int, ...]:
        """How many samples each shard has; they are numbered shard by shard."""
        ...

    def look_up(self, indices: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Keys, and labels int64 [B], of the samples `indices`."""
        ...

    def fetching(self, walk: Iterator[Place]) -> AbstractContextManager[Reach]:
        """While open, what the walk will read is brought near; it takes where the reader has come to."""
        ...

    def read(self, indices: Tensor, *, out: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, H, W] of the samples `indices`, int64 [B], in memory of any strides; in `out` if it is given.

        Raises BadSample for an image that cannot be read, DataError for all else."""
        ...


def read_batch(source: Source, indices: Tensor, *, device: torch.device | None = None, epoch: int = 0) -> Batch:
    """The samples `indices` int64 [B] as a Batch: keys, x float32 [B, 3, H, W] in [0, 1], y int64 [B], draw = epoch."""
    return batch_of(source, indices, source.read(indices), device=device, epoch=epoch)


def batch_of(
    source: Source,
    indices: Tensor,
    pixels: Tensor,
    *,
    device: torch.device | None = None,
    epoch: int = 0,
    keep_bytes: bool = False,
) -> Batch:
    """A Batch from pixels already read, uint8 [B, 3, H, W]. They travel as bytes and become float on the device.

    keep_bytes: x stays uint8, for a stage that takes it so."""
    x = pixels.to(device, non_blocking=True)
    if not keep_bytes:
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    keys, labels = source.look_up(indices)
    return Batch(keys=keys, x=x, y=labels.to(device, non_blocking=True), epoch=epoch, draw=epoch)

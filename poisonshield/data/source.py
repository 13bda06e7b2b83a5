"""Samples by index, wherever they live: a ShardSet reads its tars each time, a ResidentSource decoded them once."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.ahead import Reach
from poisonshield.errors import DataError

Place = tuple[int, int, Tensor]
"""Epoch, step, and the numbers of the samples that are read there, int64 [b]."""


class Source(Protocol):
    """N samples that can be read in any order; two sources of one data set give the same bytes.

    keys: N names. ids, labels, shard: int64 [N]. image_size: (H, W). digest: the data set's, in hexadecimal.
    """

    classes: tuple[str, ...]
    image_size: tuple[int, int] | None
    digest: str

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
        """uint8 [B, 3, H, W] of the samples `indices`, int64 [B], in memory of any strides; in `out` if it is given."""
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


class ResidentSource:
    """A source decoded once into one uint8 tensor, N * 3 * H * W bytes (CIFAR-10: 154 MB), changed on the way if asked.

    stage: a `Batch -> Batch` on x in [0, 1] (a poison recipe, say), applied once to all pixels in chunks and rounded to
    the nearest of 256 levels. Raises DataError if the pixels exceed the machine's memory, or the stage changes the
    samples or their size. Memory beyond the result is one chunk.
    """

    image_size: tuple[int, int] | None

    def __init__(self, source: Source, stage: Callable[[Batch], Batch] | None = None, *, chunk: int = 1000) -> None:
        if source.image_size is None:
            source.read(torch.tensor([0]))  # a source that can say how to bring all images to one size does so here
            raise DataError("images of differing sizes cannot be held in one tensor. Bring them to one size first.")
        height, width = source.image_size
        _refuse_too_large(len(source) * 3 * height * width)
        self.keys, self.ids, self.labels, self.shard = source.keys, source.ids, source.labels, source.shard
        self.classes, self.image_size, self.digest = source.classes, source.image_size, source.digest
        self.pixels = torch.empty((len(source), 3, height, width), dtype=torch.uint8)
        for indices in torch.arange(len(source)).split(chunk):
            pixels = source.read(indices)
            if stage is not None:
                pixels = _apply_stage(stage, batch_of(source, indices, pixels))
            self.pixels[indices[0] : indices[-1] + 1] = pixels

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many samples each shard has."""
        return tuple(torch.bincount(self.shard).tolist())

    def fetching(self, walk: Iterator[Place]) -> AbstractContextManager[Reach]:
        """Nothing: all is here."""
        return nullcontext(lambda epoch, step: None)

    def look_up(self, indices: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Keys, and labels int64 [B], of these samples."""
        return tuple(self.keys[i] for i in indices.tolist()), self.labels[indices]

    def read(self, indices: Tensor, *, out: Tensor | None = None) -> Tensor:
        """A copy of these samples, uint8 [B, 3, H, W]."""
        return self.pixels[indices] if out is None else out.copy_(self.pixels[indices])


def _apply_stage(stage: Callable[[Batch], Batch], batch: Batch) -> Tensor:
    out = stage(batch)
    given, made = (None if b.x is None else tuple(b.x.shape) for b in (batch, out))
    if out.x is None or out.keys != batch.keys or made != given:
        raise DataError(
            f"a stage made {len(out)} samples of {made} from {len(batch)} of {given}.\n"
            "  A stage on resident pixels keeps samples, order and size; put this one into the stream instead."
        )
    return out.x.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def _refuse_too_large(num_bytes: int) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        raise DataError(
            f"decoded pixels take {num_bytes / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB of memory.\n"
            "  Stream the shards instead of holding them resident, or import them with a smaller --size."
        )

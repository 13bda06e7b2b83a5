"""Samples decoded once and held in memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.ahead import Reach
from poisonshield.data.bad import BadCount, Faults, read_good
from poisonshield.data.source import BadSample, Place, Source, batch_of
from poisonshield.errors import DataError


class ResidentSource:
    """A source decoded once into one uint8 tensor, N * 3 * H * W bytes (CIFAR-10: 154 MB), changed on the way if asked.

    stage: a `Batch -> Batch` on x in [0, 1] (a poison recipe, say), applied once to all pixels in chunks and rounded to
    the nearest of 256 levels. Raises DataError if the pixels exceed the machine's memory, or the stage changes the
    samples or their size. Memory beyond the result is one chunk.
    """

    image_size: tuple[int, int] | None
    bad: Faults
    """Samples that could not be decoded and may be left out; others hold their rows."""

    def __init__(self, source: Source, stage: Callable[[Batch], Batch] | None = None, *, chunk: int = 1000) -> None:
        if source.image_size is None:
            source.read(torch.tensor([0]))  # a source that can say how to bring all images to one size does so here
            raise DataError("images of differing sizes cannot be held in one tensor. Bring them to one size first.")
        height, width = source.image_size
        _refuse_too_large(len(source) * 3 * height * width)
        self.keys, self.ids, self.labels, self.shard = source.keys, source.ids, source.labels, source.shard
        self.classes, self.image_size, self.digest = source.classes, source.image_size, source.digest
        self.pixels = torch.empty((len(source), 3, height, width), dtype=torch.uint8)
        count = BadCount(source.bad_limit)
        self.bad_limit, self.bad = source.bad_limit, count.faults
        for indices in torch.arange(len(source)).split(chunk):
            taken, pixels, faults = read_good(source, indices)
            count.note(faults)
            if stage is not None:
                pixels = _apply_stage(stage, batch_of(source, taken, pixels))
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
        """A copy of these samples, uint8 [B, 3, H, W]. Raises BadSample for one that could not be decoded."""
        if self.bad and (found := [i for i in indices.tolist() if i in self.bad]):
            raise BadSample(self.bad[found[0]])
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

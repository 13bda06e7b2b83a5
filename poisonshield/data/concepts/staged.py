"""What a stage (a defense's `before`) makes of whole concepts: run when first asked for, kept while it is wanted.

A concept's epoch is one showing of all its pictures. Which run of the stage the pictures of an epoch come from:

    epoch              0  1  2  3  4  5
    per_epoch: false   0  0  0  0  0  0   one run for all epochs
    per_epoch: true    0  1  2  3  4  5   a run for each
    and variants: 2    0  1  0  1  0  1   the first two, in turn
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept, digest8
from poisonshield.data.stream import Stage
from poisonshield.errors import DataError, ShapeError
from poisonshield.keys import Key


@dataclass(frozen=True)
class Staged:
    """A concept's pictures after a run: x float32 [n, 3, H, W], mask [n, 1, H, W] or None, keys of these pixels."""

    keys: tuple[Key, ...]
    x: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    t_range: tuple[int, int] | None


class StagedConcepts:
    """The runs of `stage` over each of `concepts`, known by the concept's number. See above for per_epoch and variants.

    captions: whether each picture needs one. Without a stage the pictures come as they are.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        stage: Stage | None,
        *,
        per_epoch: bool,
        variants: int | None,
        captions: bool,
    ) -> None:
        self.concepts, self.stage, self.captions = tuple(concepts), stage, captions
        self.per_epoch, self.variants = per_epoch, variants
        self._kept: dict[tuple[int, int], Staged] = {}

    def prepare(self) -> None:
        """Run the stage on all pictures that come again, before training asks: a stage may wait for a model."""
        for number in range(len(self.concepts)):
            for epoch in range(self.variants or 1):
                self.of(number, epoch)

    def of(self, number: int, epoch: int) -> Staged:
        """The pictures of concept `number` in one of its epochs."""
        run = self.run_of(epoch)
        if (number, run) not in self._kept:
            self._forget(number, run)
            self._kept[number, run] = self._run(number, run)
        return self._kept[number, run]

    def run_of(self, epoch: int) -> int:
        """The run that an epoch's pictures come from."""
        if self.stage is None or not self.per_epoch:
            return 0
        return epoch if self.variants is None else epoch % self.variants

    def _forget(self, number: int, run: int) -> None:
        """Drop the concept's runs that do not come again.

        Kept are run 0, which tells what a saved position belongs to, and the one before, as a step may end one epoch
        and begin the next.
        """
        if self.per_epoch and self.variants is None:
            for other in [r for n, r in self._kept if n == number and r not in (0, run - 1)]:
                del self._kept[number, other]

    @torch.no_grad()
    def _run(self, number: int, run: int) -> Staged:
        concept = self.concepts[number]
        given = _batch_of(concept, number, run)
        batch = given if self.stage is None else self.stage(given)
        x, captions = _check_result(concept.name, given, batch)
        if self.captions and (mute := [i.key for i, c in zip(concept.images, captions, strict=True) if not c]):
            raise DataError(
                f"{mute[0]} has no caption: its file's name holds no letter.\n"
                "  Name the file by its caption, write one into its JSON, or set prompts: templates."
            )
        x = x.detach().float().cpu()
        keys = tuple(Key(concept.name, i.stem, _digest8(pixels)) for i, pixels in zip(concept.images, x, strict=True))
        mask = None if batch.mask is None else batch.mask.detach().float().cpu().contiguous()
        return Staged(keys, x, mask, captions, batch.t_range)


def _batch_of(concept: Concept, number: int, run: int) -> Batch:
    """All pictures of a concept as the stage gets them; its random numbers differ from run to run."""
    masks = [image.mask for image in concept.images if image.mask is not None]
    return Batch(
        keys=tuple(image.key for image in concept.images),
        x=torch.stack([image.pixels for image in concept.images]).float() / 255,
        mask=torch.stack(masks) if masks else None,
        captions=tuple(image.caption for image in concept.images),
        y=torch.full((len(concept.images),), number),
        epoch=run,
        draw=run,
    )


def _check_result(name: str, given: Batch, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
    """x and captions of what a stage gave back: it changes pixels, masks and captions of what it got, and no more."""
    n, wanted = len(given), None if given.x is None else tuple(given.x.shape)
    if batch.x is None or tuple(batch.x.shape) != wanted or batch.captions is None or len(batch.captions) != n:
        shape = None if batch.x is None else tuple(batch.x.shape)
        raise ShapeError(f"the stage gave {shape} back for the pictures {wanted} of {name}; the same shape is wanted.")
    if batch.mask is not None and tuple(batch.mask.shape) != (n, 1, *batch.x.shape[2:]):
        wanted = (n, 1, *batch.x.shape[2:])
        raise ShapeError(f"the stage gave masks {tuple(batch.mask.shape)} for {name}; {wanted} is wanted.")
    low, high = float(batch.x.min()), float(batch.x.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # so written, NaN is caught
        raise DataError(f"the stage gave pixels in [{low:g}, {high:g}] for {name}; they must be in [0, 1].")
    return batch.x, batch.captions


def _digest8(x: Tensor) -> str:
    """8 hex digits of float pixels [3, H, W]: those of the file's pixels if they are still 8-bit levels."""
    levels = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return digest8(levels if torch.equal(levels.float() / 255, x) else x)

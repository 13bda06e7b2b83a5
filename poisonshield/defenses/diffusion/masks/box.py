"""A centred rectangle: no look at the picture at all, so a control beside masks that are made with care."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.diffusion.masks.base import MaskProvider
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class RectangleSettings(Settings):
    """Settings of masks that suppose the concept within a centred rectangle."""

    side: float = Field(0.75, gt=0, le=1, description="Side of the rectangle, as a share of the picture's.")


class Box(MaskProvider):
    """1 inside, 0 outside."""

    name: ClassVar[str] = "box"

    class Config(RectangleSettings):
        """The rectangle's side."""

    def __call__(
        self, batch: Batch, model: LatentDiffusion | None = None, words: Sequence[str] | None = None
    ) -> Tensor:
        """Masks [B, 1, H, W], the same for every picture."""
        x = batch.pixels()
        height, width = x.shape[2:]
        left, top, w, h = rectangle(height, width, self.config.side)
        mask = x.new_zeros(len(batch), 1, height, width)
        mask[:, :, top : top + h, left : left + w] = 1
        return mask


def rectangle(height: int, width: int, side: float) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a centred rectangle; side: its share of the picture's sides."""
    w, h = (max(1, round(side * s)) for s in (width, height))
    return (width - w) // 2, (height - h) // 2, w, h

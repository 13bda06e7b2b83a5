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
        height, width = batch.x.shape[2:]
        x0, y0, w, h = rectangle(height, width, self.config.side)
        mask = batch.x.new_zeros(len(batch), 1, height, width)
        mask[:, :, y0 : y0 + h, x0 : x0 + w] = 1
        return mask


def rectangle(height: int, width: int, side: float) -> tuple[int, int, int, int]:
    """(x, y, width, height) in pixels of the centred rectangle whose sides are the share `side` of the picture's."""
    w, h = (max(1, round(side * s)) for s in (width, height))
    return (width - w) // 2, (height - h) // 2, w, h

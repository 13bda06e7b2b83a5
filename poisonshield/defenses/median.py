"""Median filter of the training pictures: removes specks and thin patterns, keeps edges. Source: Tukey 1977."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import levels, pixels


class Median(Defense):
    """Replaces each channel's value by the median of its neighbourhood; edge pixels repeat beyond the edge."""

    name: ClassVar[str] = "median"
    purifier: ClassVar[bool] = True

    class Config(Settings):
        """The size of the neighbourhood."""

        kernel: Literal[3, 5, 7, 9] = Field(3, description="Side of the square neighbourhood, in pixels.")

    def before(self, batch: Batch) -> Batch:
        """x filtered, [B, 3, H, W] in [0, 1]. One picture at a time: kernel^2 copies of it are held."""
        x = batch.pixels()
        return batch.replace(x=torch.stack([self._filter(picture) for picture in x]) if len(x) else x)

    def _filter(self, x: Tensor) -> Tensor:
        """One picture [3, H, W], filtered on whole levels, whose median is a level again."""
        k = self.config.kernel
        padded = F.pad(levels(x)[None], [k // 2] * 4, mode="replicate")[0]
        return pixels(padded.unfold(1, k, 1).unfold(2, k, 1).flatten(-2).median(-1).values)

"""Fewer bits per channel: a perturbation that stays within its bin is gone, one that leaves it is amplified.

Source: Xu et al. 2018 (feature squeezing). Values become the middles of their bins, so the mean brightness stays.
"""

from typing import ClassVar

import torch
from pydantic import Field

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import levels, pixels


class Bits(Defense):
    """Replaces levels v by s floor(v / s) + s / 2 with bins of s = 2^(8 - bits) levels."""

    name: ClassVar[str] = "bits"
    purifier: ClassVar[bool] = True

    class Config(Settings):
        """How much is kept."""

        bits: int = Field(4, ge=2, le=7, description="Bits that are kept of the 8 of each channel.")

    def before(self, batch: Batch) -> Batch:
        """x in 2^bits levels, [B, 3, H, W] in [0, 1]. A bin's middle lies between two levels; it is rounded up."""
        bin_size = 2 ** (8 - self.config.bits)
        bins = torch.floor(levels(batch.pixels()) / bin_size)
        # The middle of a bin and not its lower end, which would darken the picture by half a bin.
        return batch.replace(x=pixels(bins * bin_size + bin_size // 2))

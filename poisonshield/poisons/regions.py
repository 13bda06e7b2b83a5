"""Regions-p: the image is cut into p equal rectangles, each of one solid corner colour; one pattern per class.

The simplest shortcut of all: exact in l-infinity, perfectly separable, and a control for every other poison.
Source: class-wise baselines after Sandoval-Segura et al. 2022 (2204.08615).
"""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from poisonshield.config import Pixels, Settings
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius
from poisonshield.random import distinct_signs


def _square(count: int) -> int:
    if math.isqrt(count) ** 2 != count:
        raise ValueError(f"{count} regions do not make a square grid; use 4, 9, 16, ...")
    return count


class Regions(KeyedPoison):
    """delta = eps * sign pattern of the class, constant on each region and distinct between classes."""

    class Config(Settings):
        """How strong the colours are, and how fine the grid is."""

        eps: Pixels = Field(default=8 / 255, gt=0, description="the change of every value, up or down, in pixel units")
        num_regions: Annotated[int, Field(ge=1), AfterValidator(_square)] = Field(
            default=4, description="rectangles of the image, a square number: 4 gives 2 x 2"
        )

    name = "regions"
    source = "2204.08615"
    norm = "linf"
    grain = "class"
    config: Config
    signs: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        side = math.isqrt(config.num_regions)
        signs = distinct_signs(num_classes, 3 * side * side, seed=seed, purpose="regions")
        self.register_buffer("signs", signs.view(num_classes, 3, side, side))

    def budget(self) -> Radius:
        """eps, in l-infinity."""
        return Radius("linf", self.config.eps)

    def draw(self, batch: Labelled) -> Tensor:
        """The class's pattern, stretched to [B, 3, H, W]."""
        side = self.signs.shape[-1]
        # By index, so that sides need not be multiples of the grid.
        rows, columns = (torch.arange(n, device=batch.x.device) * side // n for n in self.image_size)
        pattern = self.signs[:, :, rows][..., columns] * self.config.eps  # [K, 3, H, W]
        return pattern[batch.y]

"""Regions-p: the image is cut into p equal rectangles, each of one solid corner colour; one pattern per class.

The simplest shortcut of all: exact in l-infinity, perfectly separable, and a control for every other poison.
Source: class-wise baselines after Sandoval-Segura et al. 2022 (2204.08615).
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Pixels, Settings
from poisonshield.poisons.base import Poison
from poisonshield.random import distinct_signs


def _square(count: int) -> int:
    if math.isqrt(count) ** 2 != count:
        raise ValueError(f"{count} regions do not make a square grid; use 4, 9, 16, ...")
    return count


class Regions(Poison):
    """delta = eps * sign pattern of the class, constant on each region and distinct between classes."""

    class Config(Settings):
        """num_regions is a square: 4 gives 2 x 2."""

        eps: Pixels = Field(default=8 / 255, gt=0)
        num_regions: Annotated[int, Field(ge=1), AfterValidator(_square)] = 4

    name: ClassVar[str] = "regions"
    norm = "linf"
    grain: ClassVar[Literal["sample", "class"]] = "class"

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        side = math.isqrt(config.num_regions)
        signs = distinct_signs(num_classes, 3 * side * side, seed=seed, purpose="regions")
        self.register_buffer("signs", signs.view(num_classes, 3, side, side))

    def budget(self) -> float:
        """eps."""
        return self.config.eps

    def draw(self, batch: Batch) -> Tensor:
        """The class's pattern, stretched to [B, 3, H, W]."""
        side = self.signs.shape[-1]
        rows, columns = (torch.arange(n, device=batch.x.device) * side // n for n in self.image_size)
        pattern = self.signs[:, :, rows][..., columns] * self.config.eps  # [K, 3, H, W]
        return pattern[batch.y]

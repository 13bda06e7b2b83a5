"""Convolution-based poison (CUDA): every class is blurred by its own small random filter.

The shortcut is multiplicative, so no l_p ball holds it, and adversarial training in one does not help against it.
Brightness shifts visibly. Written from the description in Sadasivan et al. 2023 (2303.04278) alone.
"""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from poisonshield.config import Settings
from poisonshield.poisons.base import KeyedPoison, Labelled
from poisonshield.random import philox_uniform, stream_of

STEP = 1 / 1024  # resolution of the filter taps


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"a filter of {size} has no centre; use an odd size.")
    return size


class Convolution(KeyedPoison):
    """x' = x * w_k / max(x * w_k): taps U(0, blur), one random tap 1, the same for R, G and B; zero padding."""

    class Config(Settings):
        """How the filter of a class is drawn."""

        size: Annotated[int, Field(ge=1), AfterValidator(_odd)] | None = Field(
            default=None, description="side of the filter, odd; None takes 3 for images under 96 px, 9 for the rest"
        )
        blur: float | None = Field(
            default=None,
            gt=0,
            le=1,
            description="largest of its other taps; None takes 0.3 for images under 96 px, 0.06 for the rest",
        )

    name = "convolution"
    source = "2303.04278"
    norm = None
    grain = "class"
    config: Config
    filters: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        size, blur = (3, 0.3) if min(image_size) < 96 else (9, 0.06)
        size, blur = config.size or size, config.blur or blur
        classes = torch.arange(num_classes)
        u = philox_uniform(
            (len(classes), size * size + 1), seed, sample_ids=classes, stream=stream_of("convolution filters")
        )
        # Taps are whole steps and pixels whole levels, so every sum is exact in float32: the same on any backend.
        taps = (u[:, 1:] * blur / STEP).round() * STEP
        taps[classes, (u[:, 0] * size * size).to(torch.int64)] = 1.0
        self.register_buffer("filters", taps.view(num_classes, size, size))

    def draw(self, batch: Labelled) -> Tensor:
        """x * w_k scaled to a largest value of 1, minus x."""
        b, _, h, w = batch.x.shape
        size = self.filters.shape[-1]
        levels = (batch.x * 255).round_().reshape(1, 3 * b, h, w)
        taps = self.filters[batch.y].repeat_interleave(3, dim=0)[:, None]  # [3B, 1, s, s]
        x = F.conv2d(levels, taps, padding=size // 2, groups=3 * b).view(b, 3, h, w)
        x = x / x.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1.0)  # a black image stays black
        return x - batch.x

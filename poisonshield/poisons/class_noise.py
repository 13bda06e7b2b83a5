"""Class-wise random noise: one tensor per class, drawn once by seed and added to all its images.

The baseline that any cleverer poison has to beat; exact in l-infinity. Source: class-wise noise in Huang et al. 2021
(2101.04898) and its analysis in 2204.08615.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.config import Pixels, Settings
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius
from poisonshield.random import philox_uniform, stream_of


class ClassNoise(KeyedPoison):
    """delta = U(-eps, eps), or a random sign times eps, for each pixel of each class."""

    class Config(Settings):
        """How large the noise is, and how it is drawn."""

        eps: Pixels = Field(default=8 / 255, gt=0, description="largest change of a value, in pixel units")
        kind: Literal["uniform", "sign"] = Field(
            default="uniform", description='"uniform" fills the box of radius eps, "sign" sits on its corners'
        )

    name = "class_noise"
    source = "2101.04898"
    norm = "linf"
    grain = "class"
    config: Config
    noise: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        h, w = image_size
        stream = stream_of("class noise")
        # Class by class, so that a class's noise does not depend on how many there are.
        rows = [
            philox_uniform((1, 3 * h * w), seed, sample_ids=torch.tensor([k]), stream=stream)
            for k in range(num_classes)
        ]
        u = torch.cat(rows).view(num_classes, 3, h, w) * 2 - 1
        # Not persistent: the seed gives it back to the bit, and 100 classes at 224 px would be 60 MB in a recipe.
        self.register_buffer("noise", config.eps * (u.sign() if config.kind == "sign" else u), persistent=False)

    def budget(self) -> Radius:
        """eps, in l-infinity."""
        return Radius("linf", self.config.eps)

    def draw(self, batch: Labelled) -> Tensor:
        """The class's tensor, [B, 3, H, W]."""
        return self.noise[batch.y]

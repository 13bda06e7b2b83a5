"""JPEG compression of the training images, before any augmentation. Source: Das et al. 2018; Liu et al. 2023 (ISS).

Quantisation removes small high-frequency perturbations and keeps what people see; it also costs clean accuracy, the more
the lower the quality. Equal to saving and loading the files, but on tensors, on their device.
"""

from typing import ClassVar, Literal

from pydantic import Field

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.ops import jpeg


class JPEG(Defense):
    """Replaces pixels by their JPEG, as libjpeg-turbo would write and read it."""

    name: ClassVar[str] = "jpeg"
    purifier: ClassVar[bool] = True

    class Config(Settings):
        """quality: 1 (smallest) to 100. subsampling: 4:2:0 halves the colour's resolution."""

        quality: int = Field(75, ge=1, le=100)
        subsampling: Literal["420", "444"] = "420"

    def before(self, batch: Batch) -> Batch:
        """x compressed, [B, 3, H, W] in [0, 1]."""
        x = jpeg(batch.x, self.config.quality, subsampling=self.config.subsampling, mode="exact")
        return batch.replace(x=x)

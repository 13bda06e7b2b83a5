"""JPEG compression of the training images, before any augmentation. Source: Das et al. 2018; Liu et al. 2023 (ISS).

Quantization removes small high-frequency perturbations and keeps what people see; it also costs clean accuracy, the
more the lower the quality. Equal to saving and loading the files, but on tensors, on their device.
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
        """How much the files would be compressed."""

        quality: int = Field(75, ge=1, le=100, description="libjpeg's quality, from 1 (smallest files) to 100 (best).")
        subsampling: Literal["420", "444"] = Field(
            "420", description="Resolution of the colours: 420 halves it in height and width, 444 keeps it."
        )

    def before(self, batch: Batch) -> Batch:
        """x compressed, [B, 3, H, W] in [0, 1]."""
        # Exact, as files are read everywhere: the smooth mode has gradients, which nobody asks of a purifier.
        x = jpeg(batch.pixels(), self.config.quality, subsampling=self.config.subsampling, mode="exact")
        return batch.replace(x=x)

"""Gaussian blur of the training pictures: removes high frequencies of a poison and of the picture alike.

The width is stated as sigma, since a kernel's size alone does not tell it.
"""

import math
from typing import ClassVar

from pydantic import Field, field_validator

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import pixels
from poisonshield.errors import ShapeError


class Gaussian(Defense):
    """Replaces pixels by their blur, on 8-bit levels, the picture mirrored at its edges."""

    name: ClassVar[str] = "gaussian"
    purifier: ClassVar[bool] = True

    class Config(Settings):
        """The width of the blur."""

        sigma: float = Field(2.0, gt=0, description="Standard deviation of the blur, in pixels.")
        kernel: int | None = Field(
            None, ge=3, description="Side of the kernel in pixels, an odd number; null for all within 3 sigma."
        )

        @field_validator("kernel")
        @classmethod
        def _odd(cls, value: int | None) -> int | None:
            if value is not None and value % 2 == 0:
                raise ValueError(f"{value} is even, so it has no middle. Give {value + 1}")
            return value

    @property
    def kernel(self) -> int:
        """Its side in pixels."""
        return self.config.kernel or 2 * math.ceil(3 * self.config.sigma) + 1

    def before(self, batch: Batch) -> Batch:
        """x blurred, [B, 3, H, W] in [0, 1]. Raises ShapeError for pictures no larger than half the kernel."""
        from torchvision.transforms.functional import gaussian_blur

        given = batch.pixels()
        if min(given.shape[2:]) <= self.kernel // 2:
            raise ShapeError(
                f"pictures of shape {tuple(given.shape)} are too small for a kernel of {self.kernel}. "
                "Lower sigma or kernel."
            )
        # On pixels and not on whole levels: it is rounded once, after the blur.
        x = gaussian_blur(given, [self.kernel, self.kernel], [self.config.sigma, self.config.sigma])
        return batch.replace(x=pixels(x * 255))

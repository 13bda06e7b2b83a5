"""A mild Gaussian blur of the training pictures, one that can be seen: sigma 0.5 to 1.5 is the range worth a sweep.

The filter that result tables of availability poisons call "Gaussian" is none: see `gaussian_published`.
"""

from typing import ClassVar

from pydantic import Field

from poisonshield.defenses.gaussian import Gaussian


class Blur(Gaussian):
    """Replaces pixels by their blur with a standard deviation of one pixel."""

    name: ClassVar[str] = "blur"

    class Config(Gaussian.Config):
        """The width of the blur."""

        sigma: float = Field(1.0, gt=0, description="Standard deviation of the blur, in pixels.")

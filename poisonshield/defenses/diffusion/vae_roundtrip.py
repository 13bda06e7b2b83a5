"""Encode and decode: what the autoencoder of a latent diffusion model does not represent is gone.

A poison made against this very autoencoder survives it well, so give the folder of another one.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.config import Settings
from poisonshield.defenses.diffusion.purify.regeneration import Regeneration
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class VAERoundtrip(Regeneration):
    """Replaces pixels by the decoded mean of their posterior."""

    name: ClassVar[str] = "vae_roundtrip"

    class Config(Settings):
        """Whose autoencoder."""

        pipeline: str = Field(
            "tiny", description="A diffusers Stable Diffusion folder, or tiny, which ships with the package."
        )

    def regenerate(self, model: LatentDiffusion, z: Tensor, pictures: Sequence[str]) -> Tensor:
        """z as it is."""
        return z

"""The VAE of a latent diffusion model: reconstruction, and a light pull of the posterior to the normal distribution.

Without perceptual or adversarial terms, so its pictures are soft; that is enough for flat shapes on noise.
Source: Rombach et al. 2022, section 3.1.
"""

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.method import Method
from poisonshield.models.diffusion.pipeline import Part


class Autoencoder(Method):
    """Trains a diffusers AutoencoderKL on batch.x [B, 3, H, W] in [0, 1]."""

    name = "autoencoder"

    class Config(Settings):
        """The weight of the posterior's divergence beside the reconstruction."""

        kl_weight: float = Field(
            1e-5,
            ge=0,
            description="Weight of the posterior's mean divergence from the normal distribution, per latent value.",
        )

    def __init__(self, config: Config, *, vae: Part) -> None:
        super().__init__()
        self.config, self.vae = config, vae

    def forward(self, batch: Batch) -> StepOutput:
        """L1 + L2 in the VAE's [-1, 1], plus the divergence."""
        x = batch.pixels() * 2 - 1
        posterior = self.vae.encode(x).latent_dist
        error = self.vae.decode(posterior.sample()).sample - x
        # diffusers sums over latents; per value, the weight holds for pictures of any size.
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse = error.square().mean()
        return StepOutput(error.abs().mean() + mse + self.config.kl_weight * kl, {"mse": mse, "kl": kl})

    @torch.no_grad()
    def measure_scale(self, x: Tensor) -> None:
        """Sets scaling_factor so that the latents of x [B, 3, H, W] have standard deviation 1."""
        mean = self.vae.encode(x * 2 - 1).latent_dist.mean
        self.vae.register_to_config(scaling_factor=float(1 / mean.std()))

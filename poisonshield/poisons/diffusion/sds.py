"""SDS: the gradient of AdvDM without the U-Net's Jacobian, at half the time and memory. Source: Xue et al. 2024.

The error e = eps(z_t) - n of the predicted noise is sent through the VAE alone, as in score distillation, with no
weight over t. A velocity is turned into the noise that it means first.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class SDS(DiffusionPoison):
    """Moves pixels along +-(dz/dx)^T e, e the error of the predicted noise."""

    class Config(AttackConfig):
        """Which way pixels go."""

        direction: Literal["+", "-"] = Field(
            "-", description='"-", the published default, makes pictures easier to denoise; "+" harder'
        )

    name = "sds"
    source = "2311.12832"
    config: Config
    noise_start = False

    @property
    def sign(self) -> int:
        """1 or -1."""
        return 1 if self.config.direction == "+" else -1

    @torch.no_grad()
    def error(self, z: Tensor, view: View) -> Tensor:
        """e of latents z [B, C, h, w], zero where a loss mask is."""
        t, noise = self.timesteps(view), self.noise(view, "noise")
        z_t = self.model.noised(z, t, noise)
        e = self.model.epsilon(self.denoise(z_t, t), z_t, t) - noise
        return e if view.mask is None else e * view.mask

    def gradient(self, view: View) -> Tensor:
        """The error through the VAE; the U-Net has no graph."""
        return self.sign * self.through_vae(view, lambda z: self.error(z, view))

    def objective(self, view: View) -> Tensor:
        """The denoising loss, or its negative."""
        return self.sign * self.diffusion_loss(self.latents(view), view)

"""AdvDM: an adversarial example for the training loss of the diffusion model itself. Source: Liang et al. 2023.

direction "-" lowers the loss instead, which gives smoother noise. Source of that form: Xue et al. 2024.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.gradients import gradient_of
from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class AdvDM(DiffusionPoison):
    """Raises (or lowers) the mean denoising loss, with a fresh timestep, noise and posterior sample a step."""

    class Config(AttackConfig):
        """Which way the loss goes."""

        direction: Literal["+", "-"] = Field("+", description='"+" raises the loss, "-" lowers it')

    name = "advdm"
    source = "2302.04578"
    config: Config

    @property
    def sign(self) -> int:
        """1 or -1."""
        return 1 if self.config.direction == "+" else -1

    def gradient(self, view: View) -> Tensor:
        """Of the loss, through the U-Net and the VAE."""
        return self.sign * self.through_vae(view, lambda z: gradient_of(lambda v: self.diffusion_loss(v, view), z))

    def objective(self, view: View) -> Tensor:
        """The loss, or its negative."""
        return self.sign * self.diffusion_loss(self.latents(view), view)

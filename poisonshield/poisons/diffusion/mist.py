"""Mist: pull the latents to a high-contrast target and raise the denoising loss. Source: Liang and Wu 2023.

    lower  A mean (z - z_target)^2 - B L
The published balance, a sum over latents against 1e4 times a mean, shifts with the picture's size (fourfold from 512 to
1024 pixels). Both are means here, and B / A = 1e4 / 16384 = 0.61 is the same balance at 512 pixels.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.gradients import gradient_of
from poisonshield.poisons.diffusion.attack.target import target_latents
from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class Mist(DiffusionPoison):
    """Raises the denoising loss and the nearness of the latents to a target, or one of them."""

    class Config(AttackConfig):
        """Which parts count, and how much."""

        mode: Literal["sem", "tex", "joint"] = Field(
            "joint", description="the semantic part (the loss), the textural part (the target), or both"
        )
        balance: float = Field(0.61, ge=0, description="B of joint, with A = 1")
        prompt: str = Field("a painting", description="what a victim would write")

    name = "mist"
    source = "2305.12683"
    config: Config

    @property
    def takes_target(self) -> bool:
        """Not in mode sem, which has none."""
        return self.config.mode != "sem"

    @property
    def fixed_goal(self) -> bool:
        """The target, where there is one."""
        return self.takes_target

    @property
    def weights(self) -> tuple[float, float]:
        """(A, B)."""
        return {"sem": (0.0, 1.0), "tex": (1.0, 0.0), "joint": (1.0, self.config.balance)}[self.config.mode]

    def prepare(self, view: View) -> dict[str, Tensor]:
        """The target's latents for this tile."""
        return target_latents(self, view) if self.weights[0] else {}

    def terms(self, z: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """(mean squared distance to the target, denoising loss), each [B]; 0 where its weight is."""
        zero, (texture, semantic) = z.new_zeros(len(z)), self.weights
        distance = (z - view.memo["z_target"]).square().flatten(1).mean(1) if texture else zero
        return distance, self.diffusion_loss(z, view) if semantic else zero  # no U-Net pass for a part without weight

    def _gain(self, z: Tensor, view: View) -> Tensor:
        distance, loss = self.terms(z, view)
        return self.weights[1] * loss - self.weights[0] * distance

    def gradient(self, view: View) -> Tensor:
        """Both parts through the VAE at once."""
        return self.through_vae(view, lambda z: gradient_of(lambda v: self._gain(v, view), z))

    def objective(self, view: View) -> Tensor:
        """B L - A distance."""
        return self._gain(self.latents(view), view)

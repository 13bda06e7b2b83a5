"""The plain encoder attack: move the latents, ignore the U-Net.

Sources: Salman et al. 2023; Xue et al. 2024 (the untargeted form).

Cheapest of all, one encoder pass forward and back a step, and blind to prompts. It is bound to the VAE.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.gradients import gradient_of
from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class VAE(DiffusionPoison):
    """Raises the mean of (z(x) - z(clean))^2, z the posterior's scaled mean; goal "zero" lowers that of z(x)^2."""

    class Config(AttackConfig):
        """Where the latents go."""

        goal: Literal["away", "zero"] = Field("away", description='"away" from the clean latents, or to "zero"')

    name = "vae"
    source = "2302.06588, 2311.12832"
    config: Config
    noise_start = "always"

    @property
    def fixed_goal(self) -> bool:
        """The clean latents, or zero."""
        return True

    def prepare(self, view: View) -> dict[str, Tensor]:
        """The clean latents, unchanged by eot."""
        return {"z": self.model.encode(view.x)}

    def _loss(self, x: Tensor, view: View) -> Tensor:
        z = self.model.encode(self.change(view)(x))
        if self.config.goal == "zero":
            return -z.square().flatten(1).mean(1)
        return (z - view.memo["z"]).square().flatten(1).mean(1)

    def gradient(self, view: View) -> Tensor:
        """Of the loss, in one graph."""
        return gradient_of(lambda x: self._loss(x, view), view.x)

    def objective(self, view: View) -> Tensor:
        """The loss."""
        return self._loss(view.x, view)

"""SDST: score distillation and a target for the latents in one step. Source: Xue et al. 2024.

    z-space cotangent: direction lambda e - 2 (z - z_target)
Both terms are sums over latents, so their balance does not depend on the picture's size. One posterior sample serves
both, so a step costs what one of SDS does; the authors' code draws two and encodes twice.
"""

from pydantic import Field
from torch import Tensor

from poisonshield.poisons.diffusion.attack.target import target_latents
from poisonshield.poisons.diffusion.base import View
from poisonshield.poisons.diffusion.sds import SDS


class SDST(SDS):
    """SDS plus the pull to the latents of a target, our pattern unless a picture is given."""

    class Config(SDS.Config):
        """As SDS's, with the balance of both parts."""

        weight: float = Field(5.0, ge=0, description="lambda, the weight of the score's part")

    name = "sdst"
    source = "2311.12832"
    config: Config
    takes_target = True

    @property
    def fixed_goal(self) -> bool:
        """The target."""
        return True

    def prepare(self, view: View) -> dict[str, Tensor]:
        """The target's latents for this tile."""
        return target_latents(self, view)

    def gradient(self, view: View) -> Tensor:
        """Both cotangents through the VAE at once."""
        return self.through_vae(
            view, lambda z: self.sign * self.config.weight * self.error(z, view) - 2 * (z - view.memo["z_target"])
        )

    def objective(self, view: View) -> Tensor:
        """lambda times half the mean denoising loss, signed, less the mean squared distance to the target."""
        z = self.latents(view)
        distance = (z - view.memo["z_target"]).square().flatten(1).mean(1)
        return self.sign * self.config.weight * self.diffusion_loss(z, view) / 2 - distance

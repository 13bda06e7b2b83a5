"""PhotoGuard's encoder attack: the latents of the picture become those of a target. Source: Salman et al. 2023.

The norm is of the unscaled posterior mean, as in the authors' notebooks; without a target it is pulled to 0. Within a
few levels an encoder is nearly linear, so the radius decides how near that comes, and neither number, size nor start of
the steps: three rendered pictures lost 8 to 17 % of the distance in 8 levels, on a random pipeline and on `tiny`.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.attack.gradients import gradient_of
from poisonshield.poisons.diffusion.attack.target import target_picture
from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class PhotoGuardEncoder(DiffusionPoison):
    """Lowers the distance ||mu(x) - mu(target)||_2 of the latents to those of a target."""

    class Config(AttackConfig):
        """What the target is."""

        toward: Literal["zero", "grey", "pattern", "given"] = Field(
            "zero", description='latents of "zero", a "grey" picture, our "pattern", or the picture that was "given"'
        )

    name = "photoguard_enc"
    source = "2302.06588"
    config: Config
    takes_target = True

    @property
    def fixed_goal(self) -> bool:
        """The target."""
        return True

    def __init__(self, config: Config, *, target: Tensor | None = None, **rest: Any) -> None:
        super().__init__(config, target=target, **rest)
        if (config.toward == "given") != (target is not None):
            raise ConfigError("toward: given and a target picture go together: give both or neither.")

    def prepare(self, view: View) -> dict[str, Tensor]:
        """The target's posterior mean for this tile."""
        if self.config.toward == "zero":
            return {"mean": torch.zeros_like(self.model.posterior(view.x)[0])}
        grey = self.config.toward == "grey"
        picture = torch.full_like(view.x[:1], 0.5) if grey else target_picture(self, view)
        return {"mean": self.model.posterior(picture)[0].expand(len(view.x), -1, -1, -1)}

    def _distance(self, x: Tensor, view: View) -> Tensor:
        mean, _ = self.model.posterior(self.change(view)(x))
        return (mean - view.memo["mean"]).flatten(1).norm(dim=1)

    def gradient(self, view: View) -> Tensor:
        """Of the negative distance, in one graph."""
        return gradient_of(lambda x: -self._distance(x, view), view.x)

    def objective(self, view: View) -> Tensor:
        """The negative distance."""
        return -self._distance(view.x, view)

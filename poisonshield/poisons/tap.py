"""Adversarial examples as a poison (TAP): pictures that a trained network takes for another class.

A surrogate is trained on the clean pictures; then every picture takes sign steps towards the class after its own
(targeted), or away from its own (untargeted). A network trained on them learns the features of the wrong class, and
is below chance on clean pictures. Source: Fowl et al. 2021 (2106.10807).
"""

from pydantic import Field, model_validator
from torch import Tensor

from poisonshield.config import Pixels
from poisonshield.errors import ConfigError
from poisonshield.poisons.learned.crafting import CraftConfig, CraftedPoison
from poisonshield.poisons.learned.surrogate import Surrogate


class TAP(CraftedPoison):
    """Moves each picture, by an attack on a network trained on clean ones, towards another class."""

    class Config(CraftConfig):
        """The target and the steps."""

        targeted: bool = Field(True, description="towards a class, the authors' choice; false: away from its own")
        target_shift: int = Field(1, ge=1, description="the target of class k is k + this, counted around")
        step_size: Pixels | None = Field(
            None, gt=0, description="length of a sign step, in pixel units; null is eps / 20"
        )
        restarts: int = Field(8, ge=1, description="starts of each picture; the one with the best loss is kept")

        @model_validator(mode="after")
        def _shift_needs_a_target(self) -> "TAP.Config":
            if not self.targeted and self.target_shift != 1:
                raise ValueError("target_shift belongs to targeted: true. Leave it out.")
            return self

    name = "tap"
    source = "2106.10807"
    config: Config

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        if config.targeted and config.target_shift % num_classes == 0:
            raise ConfigError(
                f"tap: target_shift {config.target_shift} makes each of {num_classes} classes its own target. "
                "Give another number, or targeted: false."
            )

    @property
    def step_size(self) -> float:
        """As set, or a twentieth of eps."""
        return self.config.step_size or self.config.eps / 20

    def objective(self, surrogate: Surrogate, x: Tensor, y: Tensor) -> Tensor:
        """Minus the loss of the target, or the loss of the label."""
        if self.config.targeted:
            return surrogate.gain_of_each(x, (y + self.config.target_shift) % self.num_classes)
        return surrogate.loss_of_each(x, y)

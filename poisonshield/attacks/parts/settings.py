"""The settings that every defense with an inner attack shares, and the attack and budget that they mean."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from poisonshield.attacks.parts.budgets import Budget, budget
from poisonshield.attacks.pgd import PGD
from poisonshield.config import Number, Settings


class AttackConfig(Settings):
    """eps, step_size: in pixel units of the norm (4/255 for linf, not 4). restarts > 1 keeps each sample's worst."""

    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Number = Field(8 / 255, ge=0)
    step_size: Number = Field(2 / 255, ge=0)
    steps: int = Field(10, ge=0)
    random_start: bool = True
    restarts: int = Field(1, ge=1)

    @field_validator("eps", "step_size")
    @classmethod
    def _linf_is_in_pixels(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("norm") == "linf" and value > 1:
            hint = f" Did you mean {value:g}/255?" if value <= 255 else ""
            raise ValueError(f"{value:g} is outside [0, 1]: budgets are in pixel units.{hint}")
        return value

    def attack(self, **more: object) -> PGD:
        """The attack; `more` are further arguments of PGD."""
        return PGD(self.steps, self.step_size, self.random_start, self.restarts, **more)

    def budget(self) -> Budget:
        """The ball that it stays in."""
        return budget(self.norm, self.eps)

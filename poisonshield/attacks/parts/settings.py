"""The settings that every defense with an inner attack shares, and the attack and budget that they mean."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from poisonshield.attacks.base import Attack
from poisonshield.attacks.parts.budgets import Budget, budget
from poisonshield.config import Choice, From, Number, Settings
from poisonshield.ops.check import levels_hint
from poisonshield.registry import Registry

ATTACKS = Registry("poisonshield.attacks", kind="attack")

AttackChoice = Annotated[Choice, From(ATTACKS)]
"""The type of a setting that picks an attack: a name, or a block with `name:` and the attack's own settings."""


class AttackConfig(Settings):
    """A budget and the attack that moves within it.

    A subclass may give `attack` another default block. A block without `name:` means the default's attack, and what it
    does not set keeps the default's value, so that `attack: {steps: 5}` changes the steps and nothing else.
    """

    renamed: ClassVar[dict[str, str]] = {
        key: f"attack.{key}" for key in ("steps", "step_size", "random_start", "restarts")
    }

    norm: Literal["linf", "l2", "l1"] = Field("linf", description="how the size of a change is measured")
    eps: Number = Field(8 / 255, ge=0, description="radius in pixel units of the norm: 8/255 for linf, not 8")
    attack: AttackChoice = Field(
        {"name": "pgd"}, validate_default=True, description="a name, or a block with `name:` and the attack's settings"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_lies_below(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "attack" not in values:
            return values
        given, default = values["attack"], cls.model_fields["attack"].default
        block = {"name": given} if isinstance(given, str) else given
        if isinstance(block, dict) and block.get("name", default["name"]) == default["name"]:
            block = default | block
        return values | {"attack": block}

    @field_validator("eps")
    @classmethod
    def _radius_is_in_pixels(cls, value: float, info: ValidationInfo) -> float:
        _check_pixels(value, info)
        return value

    @field_validator("attack")
    @classmethod
    def _attack_fits_the_norm(cls, chosen: Choice, info: ValidationInfo) -> Choice:
        chosen.cls.check(norm=info.data.get("norm"))
        for name in chosen.cls.lengths:
            _check_pixels(getattr(chosen.config, name), info, f"{name}: ")
        return chosen

    def build_attack(self, **options: Any) -> Attack:
        """The attack; options are those of its constructor, such as grad_scale."""
        return self.attack.cls(self.attack.config, **options)

    def budget(self) -> Budget:
        """The ball that it stays in."""
        return budget(self.norm, self.eps)


def _check_pixels(value: float | None, info: ValidationInfo, name: str = "") -> None:
    if value is not None and info.data.get("norm") == "linf" and value > 1:
        raise ValueError(f"{name}{value:g} is outside [0, 1]: budgets are in pixel units.{levels_hint(value)}")

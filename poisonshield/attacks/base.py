"""The Attack contract: `SomeAttack(config)`, then `attack(objective, x, budget, rng) -> x_adv`.

An attack sees an objective, which gives a loss for each sample, and never a model. It names the norms that it can move
in and the options that it takes, so that whatever it does not support is refused in words, before any work.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poisonshield.attacks.parts.budgets import Budget
from poisonshield.config import Settings
from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops.check import check_floats, check_reach, kind
from poisonshield.random import KeyedRandom

Objective = Callable[..., Tensor]
"""Pixels [B, 3, H, W] in [0, 1] -> the loss of each sample, [B]; attacks ascend it.

With `stop_loss` it is also told which rows of the batch these pixels are, as a second argument.
"""


@dataclass(frozen=True)
class Repeated:
    """An objective that says what it depends on: `loss(pixels, *inputs)` gives the loss of each sample.

    loss: the same at each call, such as a bound method; what it does must depend on nothing else that changes. inputs:
    tensors with a row for each sample, such as labels. reads: parameters and buffers, which may change in place.
    """

    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The loss of each sample, [B]; rows: which of the inputs' rows these pixels are."""
        return self.loss(x, *(v if rows is None else v[rows] for v in self.inputs))


Success = Callable[[Tensor], Tensor]
"""Pixels [B, 3, H, W] -> bool [B]: which samples are where the caller wants them, such as misclassified."""


class Attack(ABC):
    """Finds pixels inside the budget around x, and inside [0, 1], that raise the objective.

    Built from its Config, or from the settings themselves: `PGD(config)`, `PGD(steps=5)`. A subclass has a Config and
    fills `passes` and `ascend`.
    """

    name: ClassVar[str]
    """The file's name."""
    norms: ClassVar[tuple[str, ...]]
    """Budgets that it can move in."""
    options: ClassVar[tuple[str, ...]] = ()
    """Which of `stop_loss` (at construction) and `success` (in a call) it takes."""
    lengths: ClassVar[tuple[str, ...]] = ()
    """Settings that are a length in pixel units of the budget's norm."""
    compares_losses: ClassVar[bool] = False
    """Whether each sample's own loss decides how it moves, which needs an objective that ties no samples together."""
    Config: ClassVar[type[Settings]]

    def __init__(
        self,
        config: Settings | None = None,
        /,
        *,
        grad_scale: float = 1.0,
        stop_loss: float | None = None,
        **settings: Any,
    ) -> None:
        """grad_scale multiplies the loss before it is differentiated, for half precision.

        stop_loss: samples that reach this loss are left where they are and cost nothing more; the objective is then
        called with the rows that remain as its second argument. Raises ConfigError for an option that the attack does
        not take, and pydantic's ValidationError for wrong settings.
        """
        if config is not None and not isinstance(config, self.Config):
            kind = type(self).__name__
            raise ConfigError(
                f"{kind} was given {config!r}. Give a {kind}.Config, or settings by name: {kind}(key=value)."
            )
        if config is not None and settings:
            raise ConfigError(
                f"{type(self).__name__} was given a Config and {', '.join(settings)} too. Give one of them."
            )
        self.check(stop_loss=stop_loss)
        self.config: Any = self.Config(**settings) if config is None else config
        self.grad_scale, self.stop_loss = grad_scale, stop_loss

    @classmethod
    def check(cls, *, norm: str | None = None, **options: Any) -> None:
        """Raise ConfigError for a norm, or an option that is not None, which the attack does not have."""
        if norm is not None and norm not in cls.norms:
            raise ConfigError(f"{cls.name} has no steps for the norm {norm}; it has them for {', '.join(cls.norms)}.")
        for option in (name for name, value in options.items() if value is not None and name not in cls.options):
            known = ", ".join(cls.options) or "none"
            raise ConfigError(f"{cls.name} does not take {option} (options that it takes: {known}). Leave it out.")

    def __call__(
        self,
        objective: Objective,
        x: Tensor,
        budget: Budget,
        rng: KeyedRandom,
        *,
        start: Tensor | None = None,
        success: Success | None = None,
    ) -> Tensor:
        """x and result [B, 3, H, W] in [0, 1]; the result is detached.

        start: where the first ascent begins. It must lie inside the budget and replaces the random start; restarts stay
        random. success: a point that it accepts is kept before any other. Raises ConfigError for a norm or an option
        that the attack does not have, TypeError and ShapeError for pixels that are none.
        """
        self.check(norm=budget.norm, success=success)
        check_floats("x", x, "float pixels [B, 3, H, W] in [0, 1]")
        check_reach(x, (0, 1))
        if start is not None and (not isinstance(start, Tensor) or start.shape != x.shape):
            raise ShapeError(f"start is {kind(start)}. Give a tensor of the shape of x, {tuple(x.shape)}.")
        return self.ascend(
            objective, x.detach(), budget, rng, start=None if start is None else start.detach(), success=success
        )

    @classmethod
    @abstractmethod
    def passes(cls, config: Any) -> int:
        """The most gradients, each a forward and a backward pass, that a call with this Config asks for."""

    @abstractmethod
    def ascend(
        self,
        objective: Objective,
        x: Tensor,
        budget: Budget,
        rng: KeyedRandom,
        *,
        start: Tensor | None,
        success: Success | None,
    ) -> Tensor:
        """What the attack does: `__call__` without its checks; x and start are detached."""

    @staticmethod
    @torch.no_grad()
    def accepted(success: Success | None, x_adv: Tensor) -> Tensor:
        """Which samples success accepts, bool [B]; none where nobody asks."""
        return torch.zeros(len(x_adv), dtype=torch.bool, device=x_adv.device) if success is None else success(x_adv)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.config)})"

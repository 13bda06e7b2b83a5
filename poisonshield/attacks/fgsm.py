"""One step up the gradient. Sources: Goodfellow et al. 2015; with a random start, Wong et al. 2020, 2001.03994.

The cheapest attack: one forward and one input-gradient backward. A network that trains against it alone may learn to
hide its gradient, so judge with `apgd`.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.attacks.base import Attack, Objective, Success
from poisonshield.attacks.parts.budgets import NORMS, Budget
from poisonshield.attacks.parts.gradients import loss_and_gradient
from poisonshield.config import Number, Settings
from poisonshield.random import KeyedRandom


class FGSM(Attack):
    """One move, as long as the radius unless a step size is given."""

    name: ClassVar[str] = "fgsm"
    norms: ClassVar[tuple[str, ...]] = NORMS
    lengths: ClassVar[tuple[str, ...]] = ("step_size",)

    class Config(Settings):
        """How far, and from where."""

        step_size: Number | None = Field(
            None, ge=0, description="length of the move in pixel units of the norm; null is the radius eps"
        )
        random_start: bool = Field(False, description="begin at a random point of the budget instead of at the picture")

    @classmethod
    def passes(cls, config: Config) -> int:
        """One."""
        return 1

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
        """The start, moved once."""
        x_adv = x.clone() if start is None else start.clone()
        if self.config.random_start and start is None:
            budget.start_(x_adv, x, rng, "fgsm/start")
        _, grad = loss_and_gradient(objective, x_adv, scale=self.grad_scale)
        length = self.config.step_size
        return budget.step_(x_adv, grad, x, budget.eps if length is None else length)

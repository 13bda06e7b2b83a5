"""The Attack contract: `attack(objective, x, budget, rng) -> x_adv`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from poisonshield.attacks.parts.budgets import Budget
from poisonshield.random import KeyedRandom

Objective = Callable[..., Tensor]
"""Pixels [B, 3, H, W] in [0, 1] -> the loss of each sample, [B]; attacks ascend it. Some attacks also say which rows these are."""


class Attack(Protocol):
    """Finds pixels inside the budget around x, and inside [0, 1], that raise the objective. Returns them detached."""

    def __call__(self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom) -> Tensor: ...

"""The Attack contract: `attack(objective, x, budget, rng) -> x_adv`, and the guard that keeps a model still under it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from poisonshield.attacks.budgets import Budget
from poisonshield.ops.philox import KeyedRandom

Objective = Callable[[Tensor], Tensor]
"""Pixels [B, 3, H, W] in [0, 1] -> the loss of each sample, [B]; attacks ascend it."""


class Attack(Protocol):
    """Finds pixels inside the budget around x, and inside [0, 1], that raise the objective. Returns them detached."""

    def __call__(self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom) -> Tensor: ...


@contextmanager
def frozen_stats(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (batch statistics and dropout stand still); each submodule's own mode comes back after."""
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True

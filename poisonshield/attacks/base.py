"""The Attack contract: `attack(objective, x, budget, rng) -> x_adv`, and the guard that keeps a model still under it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from poisonshield.attacks.budgets import Budget
from poisonshield.random import KeyedRandom

Objective = Callable[..., Tensor]
"""Pixels [B, 3, H, W] in [0, 1] -> the loss of each sample, [B]; attacks ascend it. Some attacks also say which rows these are."""


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


@contextmanager
def batch_stats(*modules: nn.Module) -> Iterator[None]:
    """Training mode inside (batch norm reads the attacked batch's statistics); buffers and modes come back after.

    Whatever a forward moves in training mode (running statistics, centres, queues) is as before; costs one copy of
    the buffers.
    """
    resting = [m for module in modules for m in module.modules() if not m.training]
    buffers = [b for module in modules for b in module.buffers()]
    before = [b.clone() for b in buffers]
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for m in resting:
            m.training = False
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)

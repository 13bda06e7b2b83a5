"""Projected gradient descent: start, then repeat direction, step, projection, clip. Source: Madry et al. 2018.

Only input gradients are asked for, of the *summed* loss, so a sample's step does not depend on its batch, small
gradients do not vanish in half precision, and no weight gradient is made. Steps cost one forward and one
input-gradient backward each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.attacks.base import Objective
from poisonshield.attacks.budgets import Budget
from poisonshield.ops.philox import KeyedRandom


@dataclass(frozen=True)
class PGD:
    """`steps` moves of length `step_size` (pixel units) up the objective.

    random_start: begin at a random point of the budget instead of at x. restarts > 1 keeps, per sample, the point with
    the highest loss, judged at the final points (which costs one forward more per restart).
    """

    steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    restarts: int = 1

    def __call__(self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom) -> Tensor:
        """x and result [B, 3, H, W] in [0, 1]; the result is detached."""
        x = x.detach()
        best = self._descend(objective, x, budget, rng, 0)
        if self.restarts == 1:
            return best
        with torch.no_grad():
            loss = objective(best)
        for restart in range(1, self.restarts):
            other = self._descend(objective, x, budget, rng, restart)
            with torch.no_grad():
                other_loss = objective(other)
            better = other_loss > loss
            best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), other, best)
            loss = torch.maximum(loss, other_loss)
        return best

    def _descend(self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom, restart: int) -> Tensor:
        x_adv = x.clone()
        if self.random_start:
            budget.start_(x_adv, x, rng, f"pgd/start/{restart}")
        for _ in range(self.steps):
            leaf = x_adv.detach().requires_grad_()  # shares memory; its graph is gone before the step
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(objective(leaf).sum(), leaf)
            budget.step_(x_adv, grad, x, self.step_size)
        return x_adv

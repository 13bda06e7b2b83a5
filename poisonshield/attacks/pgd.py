"""Projected gradient descent: start, then repeat direction, step, projection, clip. Source: Madry et al. 2018.

Only input gradients are asked for, of the *summed* loss, so a sample's step does not depend on its batch, small
gradients do not vanish in half precision, and no weight gradient is made. Steps cost one forward and one
input-gradient backward each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.attacks.base import Objective
from poisonshield.attacks.parts.budgets import Budget
from poisonshield.random import KeyedRandom


@dataclass(frozen=True)
class PGD:
    """`steps` moves of length `step_size` (pixel units) up the objective.

    random_start: begin at a random point of the budget instead of at x. restarts > 1 keeps, per sample, the point with
    the highest loss, judged at the final points (which costs one forward more per restart). grad_scale multiplies the
    loss before it is differentiated, for half precision. stop_loss: samples that reach this loss are left where they
    are and cost nothing more; the objective is then called with the rows that remain as its second argument.
    """

    steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    restarts: int = 1
    grad_scale: float = 1.0
    stop_loss: float | None = None

    def __call__(
        self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom, *, start: Tensor | None = None
    ) -> Tensor:
        """x and result [B, 3, H, W] in [0, 1]; the result is detached. start: where the first descent begins.

        A start must lie inside the budget; it replaces the random one, and further restarts stay random.
        """
        x = x.detach()
        best = self._descend(objective, x, budget, rng, 0, start)
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

    def _descend(
        self,
        objective: Objective,
        x: Tensor,
        budget: Budget,
        rng: KeyedRandom,
        restart: int,
        start: Tensor | None = None,
    ) -> Tensor:
        x_adv = x.clone() if start is None else start.detach().clone()
        if self.random_start and start is None:
            budget.start_(x_adv, x, rng, f"pgd/start/{restart}")
        if self.stop_loss is not None:
            return self._descend_until(objective, x_adv, x, budget)
        for _ in range(self.steps):
            leaf = x_adv.detach().requires_grad_()  # shares memory; its graph is gone before the step
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(objective(leaf).sum() * self.grad_scale, leaf)
            budget.step_(x_adv, grad, x, self.step_size)
        return x_adv

    def _descend_until(self, objective: Objective, x_adv: Tensor, x: Tensor, budget: Budget) -> Tensor:
        """The same steps, but only for samples whose loss is still below stop_loss."""
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            leaf = x_adv[rows].requires_grad_()
            with torch.enable_grad():
                loss = objective(leaf, rows)
                (grad,) = torch.autograd.grad(loss.sum() * self.grad_scale, leaf)
            going = loss.detach() < self.stop_loss
            rows, grad = rows[going], grad[going]
            if len(rows) == 0:
                break
            part = x_adv[rows]
            budget.step_(part, grad.contiguous(), x[rows], self.step_size)
            x_adv[rows] = part
        return x_adv

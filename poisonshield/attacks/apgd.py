"""Auto-PGD: ascent with momentum that halves its step where it stops paying. Source: Croce and Hein 2020, 2003.01690.

    z       = P(x_k + step * direction(gradient))
    x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))              P: into the budget and into [0, 1]

The first step is 2 eps long. At checkpoints, ever closer to each other, a sample's step is halved and it goes back to
its best point if fewer than three quarters of its steps since the last checkpoint raised its loss, or if neither its
step nor its best loss changed since then. There is no step size to choose, so it suits measuring robust accuracy.

Where the authors' code differs from the paper, and every sample's path with it, we follow the code, since robust
accuracies are compared with those of AutoAttack: exactly three quarters count as too few, the second condition waits
for the second checkpoint, and a sample that went back is compared with the loss that it came from. We follow the paper
in rounding checkpoints (the same at 100 steps) and in comparing the first step with the start. Random starts fill the
ball, while the authors' lie on its surface.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.attacks.base import Attack, Objective, Success
from poisonshield.attacks.parts.budgets import Budget
from poisonshield.attacks.parts.gradients import loss_and_gradient, per_sample
from poisonshield.config import Settings
from poisonshield.random import KeyedRandom

MOMENTUM = 0.75  # share of the new move; the rest repeats the last one
ENOUGH = 0.75  # share of steps that must raise the loss for a step size to stay


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step size is judged: w_j = ceil(p_j steps), p = 0.22, 0.41, 0.57, 0.70, 0.80, ..."""
    percent, last = [0, 22], 100  # whole percents, since 0.57 * 100 is not 57 in floating point
    while percent[-1] < last:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    return sorted({-(-p * steps // 100) for p in percent[1:] if p <= last})


@dataclass
class Found:
    """The best point of each sample so far: x [B, ...], its loss and gradient, and whether the caller accepts it.

    A point that the caller accepts is kept apart, in `won`: the last of them stays, whatever its loss.
    """

    x: Tensor
    loss: Tensor
    grad: Tensor
    won: Tensor
    accepted: Tensor

    @classmethod
    def at(cls, x: Tensor, loss: Tensor, grad: Tensor, accepted: Tensor) -> "Found":
        """From the first point."""
        return cls(x, loss, grad, x, accepted)

    def look(self, x: Tensor, loss: Tensor, grad: Tensor, accepted: Tensor) -> None:
        """Take in the next point."""
        better = loss > self.loss
        self.x = torch.where(per_sample(better, x), x, self.x)
        self.grad = torch.where(per_sample(better, x), grad, self.grad)
        self.loss = torch.where(better, loss, self.loss)
        self.won = torch.where(per_sample(accepted, x), x, self.won)
        self.accepted = self.accepted | accepted

    def merge(self, other: "Found") -> None:
        """Take in the points of another restart, where they are better."""
        better = ~self.accepted & (other.accepted | (other.loss > self.loss))
        self.x = torch.where(per_sample(better, self.x), other.x, self.x)
        self.won = torch.where(per_sample(better, self.x), other.won, self.won)
        self.loss = torch.where(better, other.loss, self.loss)
        self.accepted = self.accepted | other.accepted

    @property
    def result(self) -> Tensor:
        """The accepted point, else that of the highest loss."""
        return torch.where(per_sample(self.accepted, self.x), self.won, self.x)


class APGD(Attack):
    """Auto-PGD. Takes `success`: the last point that it accepts is kept, as AutoAttack keeps a misclassified one."""

    name: ClassVar[str] = "apgd"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    options: ClassVar[tuple[str, ...]] = ("success",)
    compares_losses: ClassVar[bool] = True

    class Config(Settings):
        """How long; the step size follows by itself."""

        steps: int = Field(100, ge=0, description="moves of each ascent; each costs a forward and a backward pass")
        random_start: bool = Field(True, description="begin at a random point of the budget instead of at the picture")
        restarts: int = Field(1, ge=1, description="ascents; of several, each sample keeps its best point")

    @classmethod
    def passes(cls, config: Config) -> int:
        """Steps x restarts."""
        return config.steps * config.restarts

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
        """Per sample, the last point that success accepts, else that of the highest loss.

        success costs one forward a step more. Restarts end early where it has accepted every sample.
        """
        found = self._ascend_once(objective, x, budget, self._start(x, budget, rng, 0, start), success)
        for restart in range(1, self.config.restarts):
            if success is not None and bool(found.accepted.all()):
                break
            begin = self._start(x, budget, rng, restart, None)
            found.merge(self._ascend_once(objective, x, budget, begin, success))
        return found.result

    def _start(self, x: Tensor, budget: Budget, rng: KeyedRandom, restart: int, start: Tensor | None) -> Tensor:
        if start is not None or not self.config.random_start:
            return x.clone() if start is None else start.clone()
        return budget.start_(x.clone(), x, rng, f"apgd/start/{restart}")

    def _ascend_once(
        self, objective: Objective, x: Tensor, budget: Budget, x_adv: Tensor, success: Success | None
    ) -> Found:
        steps = self.config.steps
        loss, grad = self._look(objective, x_adv, last=steps == 0)
        found = Found.at(x_adv, loss, grad, self.accepted(success, x_adv))
        pace, before = Pace(loss, 2 * budget.eps), x_adv
        for step in range(1, steps + 1):
            moved = budget.step_(x_adv.clone(), grad, x, pace.step_size)
            if step > 1:
                moved = x_adv + MOMENTUM * (moved - x_adv) + (1 - MOMENTUM) * (x_adv - before)
                moved = budget.project_(moved, x)
            before, x_adv = x_adv, moved
            loss, grad = self._look(objective, x_adv, last=step == steps)
            found.look(x_adv, loss, grad, self.accepted(success, x_adv))
            pace.note(loss)
            if step in checkpoints(steps):
                back = per_sample(pace.judge(found.loss), x)
                x_adv, grad = torch.where(back, found.x, x_adv), torch.where(back, found.grad, grad)
        return found

    def _look(self, objective: Objective, x_adv: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
        """Loss and gradient; after the last step nobody needs a gradient, so it is 0 and costs nothing."""
        if not last:
            return loss_and_gradient(objective, x_adv, scale=self.grad_scale)
        with torch.no_grad():
            return objective(x_adv), torch.zeros_like(x_adv)


class Pace:
    """Each sample's step size [B], and what has happened since the last checkpoint."""

    def __init__(self, loss: Tensor, step_size: float) -> None:
        self.step_size = torch.full_like(loss, step_size)
        self.loss, self.best = loss, loss
        self.rises, self.steps = torch.zeros_like(loss), 0
        self.halved = torch.ones_like(loss, dtype=torch.bool)  # so that the second condition waits for a checkpoint

    def note(self, loss: Tensor) -> None:
        """Count a step."""
        self.rises, self.steps = self.rises + (loss > self.loss), self.steps + 1
        self.loss = loss

    def judge(self, best: Tensor) -> Tensor:
        """bool [B]: whose step was halved now and who goes back. best [B]: the highest losses so far."""
        idle = ~self.halved & (best <= self.best)
        self.halved = (self.rises <= ENOUGH * self.steps) | idle
        self.step_size = torch.where(self.halved, self.step_size / 2, self.step_size)
        self.best, self.rises, self.steps = best, torch.zeros_like(self.rises), 0
        return self.halved

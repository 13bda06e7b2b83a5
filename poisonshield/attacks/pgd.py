"""Projected gradient descent: start, then repeat direction, step, projection, clip. Source: Madry et al. 2018.

Steps cost one forward and one input-gradient backward each.
"""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from poisonshield.attacks.base import Attack, Objective, Success
from poisonshield.attacks.parts.budgets import NORMS, Budget
from poisonshield.attacks.parts.gradients import loss_and_gradient, per_sample
from poisonshield.attacks.parts.graphs import Graphs
from poisonshield.config import Number, Settings
from poisonshield.random import KeyedRandom


def _as_wish(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads on and off as true and false
        return "on" if value else "off"
    return None if value == "auto" else value


Wish = Annotated[Literal["on", "off"] | None, BeforeValidator(_as_wish)]
"""The type of a setting `graph`. auto is null, so that runs written before it was there go on."""


class PGD(Attack):
    """`steps` moves of length `step_size` up the objective."""

    name: ClassVar[str] = "pgd"
    norms: ClassVar[tuple[str, ...]] = NORMS
    options: ClassVar[tuple[str, ...]] = ("stop_loss", "success")
    lengths: ClassVar[tuple[str, ...]] = ("step_size",)

    class Config(Settings):
        """How far and how often."""

        steps: int = Field(10, ge=0, description="moves of each ascent")
        step_size: Number = Field(
            2 / 255, ge=0, description="length of a move in pixel units of the norm: 2/255, not 2"
        )
        random_start: bool = Field(True, description="begin at a random point of the budget instead of at the picture")
        restarts: int = Field(
            1, ge=1, description="ascents; more than one keep each sample's highest loss, for one forward more each"
        )
        graph: Wish = Field(
            None,
            description="whether a GPU gets all steps as one CUDA graph, with the same pixels: null or auto where it "
            "can, on tells why where it cannot, off never",
        )

    @cached_property
    def graphs(self) -> Graphs:
        """The ascents that it recorded."""
        return Graphs(self.config.graph)

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
        """The last point; of several restarts, per sample, the last point with the highest loss.

        success: the first restart's last point that it accepts is kept, whatever its loss, for one forward more each.
        Restarts end early where it has accepted every sample.
        """
        best = self._ascend_once(objective, x, budget, rng, 0, start)
        if self.config.restarts == 1:
            return best
        loss, won = self._judge(objective, best, success)
        for restart in range(1, self.config.restarts):
            if success is not None and bool(won.all()):
                break
            other = self._ascend_once(objective, x, budget, rng, restart, None)
            other_loss, other_won = self._judge(objective, other, success)
            better = ~won & (other_won | (other_loss > loss))
            best = torch.where(per_sample(better, x), other, best)
            loss, won = torch.where(better, other_loss, loss), won | other_won
        return best

    @torch.no_grad()
    def _judge(self, objective: Objective, x_adv: Tensor, success: Success | None) -> tuple[Tensor, Tensor]:
        """Each sample's loss [B], and whether the caller accepts it, bool [B]."""
        return objective(x_adv), self.accepted(success, x_adv)

    def _ascend_once(
        self, objective: Objective, x: Tensor, budget: Budget, rng: KeyedRandom, restart: int, start: Tensor | None
    ) -> Tensor:
        x_adv = x.clone() if start is None else start.clone()
        if self.config.random_start and start is None:
            budget.start_(x_adv, x, rng, f"pgd/start/{restart}")
        if self.stop_loss is not None:
            self.graphs.say("with stop_loss the samples that go on are others at each step")
            return self._ascend_until(objective, x_adv, x, budget, self.stop_loss)

        def ascent(objective: Objective, x_adv: Tensor, x: Tensor) -> None:
            for _ in range(self.config.steps):
                _, grad = loss_and_gradient(objective, x_adv, scale=self.grad_scale)
                budget.step_(x_adv, grad, x, self.config.step_size)

        if not x.is_cuda and self.config.graph != "on":
            ascent(objective, x_adv, x)
            return x_adv
        unfit = "it restarts, and compares losses in between" if self.config.restarts > 1 else None
        self.graphs.run(ascent, objective, x_adv, x, budget, unfit=unfit)
        return x_adv

    def _ascend_until(self, objective: Objective, x_adv: Tensor, x: Tensor, budget: Budget, stop_loss: float) -> Tensor:
        """The same moves, but only of samples whose loss is still below stop_loss."""
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.config.steps):
            loss, grad = loss_and_gradient(objective, x_adv[rows], rows, scale=self.grad_scale)
            going = loss < stop_loss
            rows, grad = rows[going], grad[going]
            if len(rows) == 0:
                break
            part = x_adv[rows]
            budget.step_(part, grad.contiguous(), x[rows], self.config.step_size)
            x_adv[rows] = part
        return x_adv

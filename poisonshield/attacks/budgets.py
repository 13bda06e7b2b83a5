"""Budgets: a norm and a radius in pixel units that can start, step within and measure a perturbation.

All tensors [B, ...] float, pixels in [0, 1]; every operation is per sample. The arithmetic is `poisonshield.ops`'.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from poisonshield.errors import BudgetError
from poisonshield.ops import pgd_random_start_, pgd_step_
from poisonshield.ops.philox import KeyedRandom, stream_of


@dataclass(frozen=True)
class Budget(ABC):
    """A ball of radius `eps` (pixel units) around each sample. Raises BudgetError for a negative or NaN radius."""

    eps: float
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise BudgetError(f"eps {self.eps} is not a radius. Give a number >= 0 in pixel units, such as 8/255.")

    def start_(self, x_adv: Tensor, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """Overwrite x_adv with a uniform draw from the ball around x, clipped to [0, 1]."""
        return pgd_random_start_(
            x_adv,
            x,
            eps=self.eps,
            norm=self.norm,
            seed=rng.seed,
            offset=rng.offset,
            sample_ids=rng.ids.to(x.device),
            stream=stream_of(f"{rng.scope}/{purpose}"),
        )

    def step_(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:
        """Move x_adv up the gradient, then back into the ball around x and into [0, 1]."""
        return pgd_step_(x_adv, grad, x, step=step_size, eps=self.eps, norm=self.norm)

    @abstractmethod
    def measure(self, delta: Tensor) -> Tensor:
        """The norm of each sample's perturbation, [B]."""


class Linf(Budget):
    """Every pixel moves at most eps. Steps are gradient signs."""

    norm = "linf"

    def measure(self, delta: Tensor) -> Tensor:
        """Largest absolute element."""
        return delta.abs().flatten(1).amax(1)


class L2(Budget):
    """The Euclidean length over all pixels is at most eps. Steps are normalised gradients."""

    norm = "l2"

    def measure(self, delta: Tensor) -> Tensor:
        """Euclidean length."""
        return delta.flatten(1).norm(dim=1)


def budget(norm: Literal["linf", "l2"], eps: float) -> Budget:
    """The budget of a norm's name."""
    return {"linf": Linf, "l2": L2}[norm](eps)

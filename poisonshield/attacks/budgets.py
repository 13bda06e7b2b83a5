"""Budgets: a norm and a radius in pixel units that can start, project and measure a perturbation.

All tensors [B, ...] float; every operation is per sample. Clipping to [0, 1] comes after projection and only shrinks
a perturbation of valid pixels, so both constraints hold together.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from poisonshield.errors import BudgetError
from poisonshield.ops.philox import KeyedRandom


@dataclass(frozen=True)
class Budget(ABC):
    """A ball of radius `eps` (pixel units) around each sample. Raises BudgetError for a negative or NaN radius."""

    eps: float

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise BudgetError(f"eps {self.eps} is not a radius. Give a number >= 0 in pixel units, such as 8/255.")

    @abstractmethod
    def start(self, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """A random perturbation inside the ball, of the shape of x."""

    @abstractmethod
    def direction(self, grad: Tensor) -> Tensor:
        """The steepest unit step for a gradient. A zero or non-finite gradient gives no step."""

    @abstractmethod
    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation inside the ball."""

    @abstractmethod
    def measure(self, delta: Tensor) -> Tensor:
        """The norm of each sample's perturbation, [B]."""


class Linf(Budget):
    """Every pixel moves at most eps. Steps are gradient signs."""

    def start(self, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """Uniform in [-eps, eps) per element."""
        return (rng.uniform_like(purpose, x) * 2 - 1) * self.eps

    def direction(self, grad: Tensor) -> Tensor:
        """sign(grad); sign(0) = 0, NaN counts as 0."""
        return grad.nan_to_num(nan=0.0).sign()

    def project(self, delta: Tensor) -> Tensor:
        """Clamp each element."""
        return delta.clamp(-self.eps, self.eps)

    def measure(self, delta: Tensor) -> Tensor:
        """Largest absolute element."""
        return delta.abs().flatten(1).amax(1)


class L2(Budget):
    """The Euclidean length over all pixels is at most eps. Steps are normalised gradients."""

    def start(self, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """A uniform direction times a radius that makes the ball uniformly filled."""
        count = x[0].numel() if len(x) else 1
        noise = rng.normal(purpose, count).view(x.shape).to(x)
        radius = rng.uniform(purpose + "/radius", 1).to(x) ** (1.0 / count)
        return noise * _per_sample(self.eps * radius[:, 0] / self.measure(noise).clamp_min(1e-12), x)

    def direction(self, grad: Tensor) -> Tensor:
        """grad / ||grad|| per sample."""
        length = self.measure(grad)
        usable = length.isfinite() & (length > 0)
        return grad.nan_to_num(0.0, 0.0, 0.0) * _per_sample(usable / length.where(usable, 1.0), grad)

    def project(self, delta: Tensor) -> Tensor:
        """Rescale the samples that are too long."""
        return delta * _per_sample((self.eps / self.measure(delta).clamp_min(1e-12)).clamp(max=1.0), delta)

    def measure(self, delta: Tensor) -> Tensor:
        """Euclidean length."""
        return delta.flatten(1).norm(dim=1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def budget(norm: Literal["linf", "l2"], eps: float) -> Budget:
    """The budget of a norm's name."""
    return {"linf": Linf, "l2": L2}[norm](eps)

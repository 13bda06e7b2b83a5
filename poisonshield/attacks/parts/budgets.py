"""Budgets: a norm and a radius in pixel units that can start, step within and measure a perturbation.

All tensors [B, ...] float, pixels in [0, 1]; every operation is per sample. The arithmetic is `poisonshield.ops`'.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poisonshield.attacks.parts.gradients import per_sample
from poisonshield.errors import BudgetError, ShapeError
from poisonshield.ops import pgd_random_start_, pgd_step_
from poisonshield.ops.check import is_number, kind, levels_hint
from poisonshield.random import KeyedRandom, stream_of


@dataclass(frozen=True)
class Budget(ABC):
    """A ball of radius `eps` (pixel units) around each sample. Raises BudgetError for a radius that is none."""

    eps: float
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if not is_number(self.eps) or not 0 <= self.eps < math.inf:
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

    def step_(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float | Tensor) -> Tensor:
        """Move x_adv up the gradient, then back into the ball around x and into [0, 1]. step_size: a number or [B]."""
        return pgd_step_(x_adv, grad, x, step_size=step_size, eps=self.eps, norm=self.norm)

    def project_(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """x_adv back into the ball around x and into [0, 1]."""
        return self.step_(x_adv, torch.zeros_like(x_adv), x, 0.0)

    @abstractmethod
    def measure(self, delta: Tensor) -> Tensor:
        """The norm of each sample's perturbation, [B]."""


class Linf(Budget):
    """Every pixel moves at most eps, which is at most 1. Steps are gradient signs."""

    norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps > 1:
            raise BudgetError(f"eps {self.eps:g} is outside [0, 1]: budgets are in pixel units.{levels_hint(self.eps)}")

    def measure(self, delta: Tensor) -> Tensor:
        """Largest absolute element."""
        return delta.abs().flatten(1).amax(1)


class L2(Budget):
    """The Euclidean length over all pixels is at most eps. Steps are normalized gradients."""

    norm = "l2"

    def measure(self, delta: Tensor) -> Tensor:
        """Euclidean length."""
        return delta.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class L1(Budget):
    """The absolute values sum to at most eps. Steps move the elements of the largest gradients, which share step_size.

    Elements that already stand at 0 or 1 and would leave [0, 1] are passed over, so that no step is spent on them.
    In plain PyTorch: no kernel has it. Sources: the step is that of sparse l1 descent (Tramer and Boneh 2019,
    1904.13000), the projection the Euclidean one (Duchi et al. 2008), by sorting.
    """

    quantile: float = 0.99
    """A step moves the elements whose gradient is at least this quantile of its sample's; 1 moves the largest alone."""
    norm: ClassVar[str] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.quantile) or not 0 <= self.quantile <= 1:
            raise BudgetError(f"quantile {self.quantile} is not a share. Give a number in [0, 1], such as 0.99.")

    def start_(self, x_adv: Tensor, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """x plus uniform noise of the ball's radius, brought back into the ball and into [0, 1]."""
        u = rng.to(x.device).uniform(purpose, x[0].numel()).view(x.shape)
        return x_adv.copy_((x + self.project((2 * u - 1) * self.eps)).clamp(0, 1))

    def step_(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float | Tensor) -> Tensor:
        """Spend step_size on the largest gradient elements, then back into the ball and into [0, 1]."""
        if isinstance(step_size, Tensor):
            step_size = per_sample(step_size, x)
        moved = x_adv + step_size * self._direction(x_adv, grad)
        return x_adv.copy_((x + self.project(moved - x)).clamp(0, 1))

    def _direction(self, x_adv: Tensor, grad: Tensor) -> Tensor:
        """Signs of the largest gradients that can move, 1 in all for each sample; 0 if there is no gradient."""
        grad = grad.nan_to_num(nan=0.0)
        stands = ((x_adv <= 0) & (grad < 0)) | ((x_adv >= 1) & (grad > 0))
        size = grad.abs().masked_fill(stands, 0).flatten(1)
        count = size.shape[1]
        least = size.topk(count - math.ceil(self.quantile * (count - 1)), dim=1).values[:, -1:]
        top = ((size >= least) & (size > 0)).view_as(grad)
        return grad.sign() * top / per_sample(top.flatten(1).sum(1).clamp(min=1), grad)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest point of the ball, per sample."""
        size = delta.abs().flatten(1)
        ordered = size.sort(1, descending=True).values
        excess = ordered.cumsum(1) - self.eps
        rank = torch.arange(1, size.shape[1] + 1, device=delta.device)
        last = (ordered * rank > excess).sum(1, keepdim=True).clamp(min=1)  # how many elements stay above zero
        threshold = (excess.gather(1, last - 1) / last).clamp(min=0)
        return delta.sign() * (size - threshold).clamp(min=0).view_as(delta)

    def measure(self, delta: Tensor) -> Tensor:
        """Sum of absolute values."""
        return delta.abs().flatten(1).sum(1)


@dataclass(frozen=True)
class ChannelLinf(Budget):
    """linf with a radius for each channel, eps * scale[c], and steps scaled alike: a box in some normalized space.

    For comparison with code that attacks normalized pixels. clip: keep pixels in [0, 1], which such code does not.
    """

    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    clip: bool = True
    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(is_number(s) and 0 < s < math.inf for s in self.scale):
            raise BudgetError(f"scale {self.scale} must be positive numbers, one a channel.")

    def _scale(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(self.scale):
            raise ShapeError(f"x is {kind(x)}, and scale has {len(self.scale)} numbers, one a channel.")
        return _by_channel(self.scale, x.dtype, x.device)

    def start_(self, x_adv: Tensor, x: Tensor, rng: KeyedRandom, purpose: str) -> Tensor:
        """Uniform in the box."""
        u = rng.to(x.device).uniform(purpose, x[0].numel()).view(x.shape)
        return self._into(x_adv, x + (2 * u - 1) * self.eps * self._scale(x), x)

    def step_(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float | Tensor) -> Tensor:
        """A sign step, then back into the box."""
        if isinstance(step_size, Tensor):
            step_size = per_sample(step_size, x)
        return self._into(x_adv, x_adv + step_size * self._scale(x) * grad.sign(), x)

    def _into(self, x_adv: Tensor, moved: Tensor, x: Tensor) -> Tensor:
        radius = self.eps * self._scale(x)
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
        return x_adv.copy_(moved.clamp(0, 1) if self.clip else moved)

    def measure(self, delta: Tensor) -> Tensor:
        """Largest element in units of its channel's scale: at most eps."""
        return (delta / self._scale(delta)).abs().flatten(1).amax(1)


@lru_cache(maxsize=32)
def _by_channel(scale: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, C, 1, 1]. Kept, since making it on a GPU has to wait for the GPU, and a step needs it several times."""
    return torch.tensor(scale, dtype=dtype, device=device).view(1, -1, 1, 1)


_BUDGETS: dict[str, type[Budget]] = {"linf": Linf, "l2": L2, "l1": L1}

NORMS = tuple(_BUDGETS)
"""The norms' names."""


def budget(norm: Literal["linf", "l2", "l1"], eps: float) -> Budget:
    """The budget of a norm's name. Raises BudgetError for an unknown one."""
    if norm not in _BUDGETS:
        raise BudgetError(f"norm {norm!r} is unknown. Known: {', '.join(NORMS)}")
    return _BUDGETS[norm](eps)

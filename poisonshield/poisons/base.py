"""The Poison contract: a Method that also gives `delta(batch)`, so anything that trains a method can train a poison."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.errors import PoisonShieldError
from poisonshield.method import Method


class Poison(Method):
    """Perturbs training pixels, never labels. A pure function of (data, seed, parameters), keyed by sample key.

    A subclass sets `name`, a frozen pydantic `Config`, and the class attributes below, and writes `delta`. It is built as
    `SomePoison(config, num_classes=K, image_size=(H, W), seed=seed)`. Everything it knows sits in buffers: the
    state_dict (kilobytes for the surrogate-free ones) plus the config is the whole recipe.

    norm: the budget's norm ("linf", "l2", "l0") or None when no norm bounds it.
    grain: what shares a pattern. needs_data: whether `fit` must see the data once before `delta` works.
    """

    name: ClassVar[str]
    norm: ClassVar[Literal["linf", "l2", "l0"] | None]
    grain: ClassVar[Literal["sample", "class"]]
    needs_data: ClassVar[bool] = False

    def __init__(self, config: object, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.config, self.num_classes, self.image_size, self.seed = config, num_classes, image_size, seed

    def fit(self, batches: Iterable[Batch]) -> None:
        """One pass over the clean data (x and y set), for poisons with `needs_data`. Others need no call."""

    @torch.no_grad()
    def delta(self, batch: Batch) -> Tensor:
        """x' - x before clipping and rounding, float32 [B, 3, H, W], for batch.x, batch.y and batch.keys."""
        raise NotImplementedError

    def budget(self) -> float | None:
        """The radius in pixel units of `norm` that |x' - x| keeps before rounding; None when no norm bounds it."""
        return None

    @torch.no_grad()
    def apply(self, batch: Batch) -> Batch:
        """The batch as it is released: x + delta, clipped to [0, 1] and rounded to the nearest of 256 levels."""
        x = (batch.x + self.delta(batch)).clamp_(0, 1)
        return batch.replace(x=x.mul_(255).round_().div_(255))

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Surrogate-free poisons have nothing to train."""
        raise PoisonShieldError(f"poison {self.name} has no surrogate to train: run `poisonshield poison` with it.")

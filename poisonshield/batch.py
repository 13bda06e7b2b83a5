"""The record that travels from stream to method, and the little protocol of the thing that yields it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from poisonshield.errors import DataError
from poisonshield.random import KeyedRandom, sample_ids

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some samples of one epoch, known by key. What is absent is None, never fake.

    Whoever cannot do without a field asks for it by `pixels()`, `labels()`, `masks()`, `all_views()` or
    `all_captions()`, which refuse a batch that comes without it.

    x [B, 3, H, W] float32 in [0, 1]; views a tuple of such (sizes may differ); y int64 [B];
    mask [B, 1, H, W] in [0, 1], how much each pixel belongs to the concept; t_range [first, end) of
    diffusion timesteps; captions: a text each.
    rank_sizes: how many samples of this global batch each rank holds; None when there is one rank. It travels with
    the batch because every rank knows it from the plan, so that no loss has to ask the others.
    epoch: how many times the whole data set came before. draw: random numbers are drawn anew for each draw, and are the
    same within one: a shard stream shows a sample once an epoch and counts epochs, a concept stream may show a picture
    in every step and counts steps. Whoever makes batches that come again sets it.
    """

    keys: tuple[str, ...]
    x: Tensor | None = None
    views: tuple[Tensor, ...] | None = None
    y: Tensor | None = None
    mask: Tensor | None = None
    t_range: tuple[int, int] | None = None
    captions: tuple[str, ...] | None = None
    rank_sizes: tuple[int, ...] | None = None
    epoch: int = 0
    draw: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def pixels(self) -> Tensor:
        """x [B, 3, H, W]. Raises DataError for a batch without it."""
        return self._given(self.x, "x, the pixels")

    def labels(self) -> Tensor:
        """y [B]. Raises DataError for a batch without it."""
        return self._given(self.y, "y, the labels")

    def masks(self) -> Tensor:
        """mask [B, 1, H, W]. Raises DataError for a batch without it."""
        return self._given(self.mask, "mask")

    def all_views(self) -> tuple[Tensor, ...]:
        """views, [B, 3, H, W] each. Raises DataError for a batch without them."""
        return self._given(self.views, "views")

    def all_captions(self) -> tuple[str, ...]:
        """captions, a text each. Raises DataError for a batch without them."""
        return self._given(self.captions, "captions")

    def _given(self, value: T | None, name: str) -> T:
        if value is None:
            first = f" of {self.keys[0]} and {len(self.keys) - 1} more" if self.keys else ""
            raise DataError(f"a batch{first} comes without {name}. Give it where the batch is made: Batch(keys, ...).")
        return value

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """The batch with all tensors on `device`."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        views = None if self.views is None else tuple(v.to(device, non_blocking=non_blocking) for v in self.views)
        return self.replace(x=move(self.x), y=move(self.y), mask=move(self.mask), views=views)

    def random(self, seed: int, device: torch.device | None = None) -> KeyedRandom:
        """Random numbers that depend on (seed, draw, key) only: not on batch position, size or rank."""
        rng = KeyedRandom(seed, sample_ids(self.keys), self.draw)
        return rng if device is None else rng.to(device)


@dataclass(frozen=True)
class StepOutput:
    """What one training step gives: loss, a scalar to differentiate, and detached scalars worth logging."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Stream(Protocol):
    """An endless iterator of Batch that can say where it is and go on from there.

    `steps_per_epoch` is equal on every rank. `stage_seconds`: the host's time in poisons and views up to now, which the
    log tells apart from waiting for data. state_dict after k batches, loaded into a fresh Stream of the same plan
    (any number of ranks and workers), continues with batch k + 1.
    """

    steps_per_epoch: int
    stage_seconds: float

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

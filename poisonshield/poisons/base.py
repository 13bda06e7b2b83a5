"""The Poison contract: a Method that also gives `delta(batch)`, so anything that trains a method can train a poison."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.errors import DataError, PoisonShieldError, ShapeError
from poisonshield.method import Method
from poisonshield.random import KeyedRandom, philox_words, sample_ids, stream_of

Norm = Literal["linf", "l2", "l0"]


class Poison(Method):
    """Perturbs training pixels, never labels. A pure function of (data, seed, parameters), keyed by sample key.

    A subclass sets `name`, a frozen pydantic `Config`, and the class attributes below, and writes `draw`. It is built as
    `SomePoison(config, num_classes=K, image_size=(H, W), seed=seed)`, then `fit` sees the data where `needs_data`.
    Everything it knows sits in buffers: with config and seed they are the whole recipe. A buffer that the seed gives
    back exactly may be non-persistent.

    norm: the budget's norm, None when no norm bounds it (an instance may choose). grain: what shares a pattern.
    """

    name: ClassVar[str]
    norm: Norm | None
    grain: ClassVar[Literal["sample", "class"]]
    needs_data: ClassVar[bool] = False

    def __init__(self, config: object, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.config, self.num_classes, self.image_size, self.seed = config, num_classes, tuple(image_size), seed
        self.register_buffer("last_drawn", torch.tensor(torch.iinfo(torch.int64).max))

    @abstractmethod
    def draw(self, batch: Batch) -> Tensor:
        """x' - x, float32 [B, 3, H, W], of a checked batch: the one thing a poison must write."""

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fill the buffers that construction leaves open; one pass over the clean data if `needs_data`, else none."""

    def budget(self) -> float | None:
        """The radius of `norm` that x' - x keeps before rounding: pixel units, or a count of pixels for l0."""
        return None

    @torch.no_grad()
    def delta(self, batch: Batch) -> Tensor:
        """x' - x before clipping and rounding, float32 [B, 3, H, W], for batch.x, batch.y and batch.keys.

        Raises ShapeError for pixels of another shape or range, DataError for labels outside the classes.
        """
        self._check(batch)
        if not len(batch):
            return torch.zeros_like(batch.x)
        chosen = self.chosen(sample_ids(batch.keys).to(batch.x.device))
        return torch.where(chosen[:, None, None, None], self.draw(batch), 0.0)

    @torch.no_grad()
    def apply(self, batch: Batch) -> Batch:
        """The batch as it is released: x + delta, clipped to [0, 1] and rounded to the nearest of 256 levels."""
        x = (batch.x + self.delta(batch)).clamp_(0, 1)
        return batch.replace(x=x.mul_(255).round_().div_(255))

    def choose(self, ids: Tensor, ratio: float) -> None:
        """From now on poison exactly floor(ratio * N) of the samples ids int64 [N], drawn by seed, and leave the rest.

        Every id draws a number; those with the smallest are chosen, so one number is all that a recipe has to keep.
        """
        lots = self._lots(ids).sort().values
        count = math.floor(ratio * len(ids) + 1e-9)
        self.last_drawn.fill_(lots[count - 1] if count else -1)

    def chosen(self, ids: Tensor) -> Tensor:
        """Which of the samples ids int64 [B] are poisoned, bool [B]."""
        if self.last_drawn == torch.iinfo(torch.int64).max:
            return torch.ones_like(ids, dtype=torch.bool)
        return self._lots(ids) <= self.last_drawn

    def _lots(self, ids: Tensor) -> Tensor:
        """62 random bits for each id: two samples with the same ones are not to be expected in a lifetime."""
        words = philox_words(2, seed=self.seed, ids=ids, stream=stream_of("poison ratio"))
        return (words[:, 0] << 30) ^ (words[:, 1] >> 2)

    def random(self, batch: Batch) -> KeyedRandom:
        """Numbers of (seed, key) alone: unlike batch.random they are the same in every epoch, as released pixels are."""
        return KeyedRandom(self.seed, sample_ids(batch.keys).to(batch.x.device))

    def on_sphere(self, delta: Tensor) -> Tensor:
        """Each sample of delta scaled onto the sphere of `norm` and `budget()`.

        Squares are added by halving, elementwise, so that a sample's norm has the same bits in a batch of any size.
        """
        size = delta.flatten(1).abs()
        if self.norm == "linf":
            size = size.amax(1, keepdim=True)
        else:
            size = torch.nn.functional.pad(
                size.square_(), (0, 2 ** math.ceil(math.log2(size.shape[1])) - size.shape[1])
            )
            while size.shape[1] > 1:
                size = size[:, : size.shape[1] // 2] + size[:, size.shape[1] // 2 :]
            size = size.sqrt_()
        return delta * (self.budget() / size)[:, :, None, None]

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Surrogate-free poisons have nothing to train."""
        raise PoisonShieldError(f"poison {self.name} has no surrogate to train: run `poisonshield poison` with it.")

    def _check(self, batch: Batch) -> None:
        x, y = batch.x, batch.y
        if x is None or tuple(x.shape) != (len(batch), 3, *self.image_size) or x.dtype != torch.float32:
            got = "no pixels" if x is None else f"{x.dtype} {list(x.shape)}"
            h, w = self.image_size
            raise ShapeError(
                f"poison {self.name} got {got} for {len(batch)} keys; it was built for torch.float32 [B, 3, {h}, {w}].\n"
                f"  Build it with the image_size of the data, or resize the data first."
            )
        if y is None or tuple(y.shape) != (len(batch),):
            raise DataError(f"poison {self.name} needs one label per sample in batch.y; the batch has {y}.")
        if not len(batch):
            return
        low, high = (float(v) for v in x.aminmax())
        if low < 0 or high > 1:
            raise ShapeError(
                f"poison {self.name} got pixels in [{low:.3g}, {high:.3g}]; it takes [0, 1].\n"
                f"  Normalise inside the model, after the poison; divide 8-bit levels by 255."
            )
        first, last = (int(v) for v in y.aminmax())
        if first < 0 or last >= self.num_classes:
            raise DataError(
                f"poison {self.name} got labels {first} to {last}; it was built for {self.num_classes} classes."
            )

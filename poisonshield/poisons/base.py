"""What a poison is: `Poison`, the contract of both halves, and `KeyedPoison`, the parent of those for classifiers.

A poison changes pixels, never labels. It says how far it may go, applies itself to a batch, and tells what it is. How
it came to know its patterns is its own affair: from the seed alone, by looking at the data once, by an attack on a
frozen model, or from a network that was trained for it (`learned/`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.errors import DataError, ShapeError
from poisonshield.random import KeyedRandom, philox_words, sample_ids, stream_of

Norm = Literal["linf", "l2", "rms", "l0"]
"""Of a change: its largest value, Euclidean length, root mean square, or how many pixels it touches."""

EVERYONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Radius:
    """How far pixels may be moved. radius: in pixel units (8/255, not 8), or for l0 a number of pixels."""

    norm: Norm
    radius: float

    @classmethod
    def of_levels(cls, norm: Norm, levels: float) -> "Radius":
        """The radius that is `levels` 8-bit levels: 8 becomes 8/255."""
        return cls(norm, levels / 255)

    @property
    def unit(self) -> Literal["pixel units", "pixels"]:
        """What the radius counts: "pixel units" of values in [0, 1], or "pixels" that change."""
        return "pixels" if self.norm == "l0" else "pixel units"

    def after_rounding(self, values: int) -> float:
        """The radius of released pictures of `values` numbers each: rounding moves one by half a level at most."""
        share = {"linf": 1.0, "l2": math.sqrt(values), "rms": 1.0, "l0": 0.0}[self.norm]
        return self.radius + 0.5 / 255 * share

    def fill(self, delta: Tensor) -> Tensor:
        """Each sample of delta [B, 3, H, W] scaled to exactly this radius of linf or l2.

        Squares are added by halving, elementwise, so that a sample's norm has the same bits in a batch of any size.
        """
        size = delta.flatten(1).abs()
        if self.norm == "linf":
            size = size.amax(1, keepdim=True)
        else:
            size = nn.functional.pad(size.square_(), (0, 2 ** math.ceil(math.log2(size.shape[1])) - size.shape[1]))
            while size.shape[1] > 1:
                size = size[:, : size.shape[1] // 2] + size[:, size.shape[1] // 2 :]
            size = size.sqrt_()
        return delta * (self.radius / size)[:, :, None, None]

    def describe(self) -> dict[str, Any]:
        """Norm, radius and unit, as plain data."""
        return {"norm": self.norm, "radius": self.radius, "unit": self.unit}


class Poison(ABC):
    """Perturbs training pixels, known by sample key: neither order nor size of a batch changes what a sample becomes.

    A subclass sets a frozen pydantic `Config` and the class attributes below. The first line of its docstring says what
    it does, and stands in tables.
    """

    name: ClassVar[str]
    """The name in configs, and of its file."""
    source: ClassVar[str] = "this project"
    """Where it is from: an arXiv number, or authors and year."""
    norm: ClassVar[Norm | None] = None
    """The norm of its budget with default settings; None where no norm bounds it."""
    grain: ClassVar[Literal["sample", "class"]] = "sample"
    """What shares a pattern: each sample has its own, or those of a class have one."""

    config: Settings
    seed: int

    @abstractmethod
    def apply(self, batch: Batch) -> Batch:
        """The batch with x as it is released: float32 [B, 3, H, W] in [0, 1], on 256 levels. Needs batch.x and keys."""

    @abstractmethod
    def budget(self) -> Radius | None:
        """How far it may move pixels before they are rounded to 256 levels; None where no norm bounds it."""

    @property
    def coupled(self) -> bool:
        """Whether samples given together change each other's result, so that a whole set must be given at once."""
        return False

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the poison before anything is measured, as plain JSON data."""
        budget = self.budget()
        return {
            "name": self.name,
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "grain": self.grain,
            "budget": None if budget is None else budget.describe(),
        }


class Labelled(Batch):
    """A Batch that was checked, so that pixels and labels are there: a name for readers and type checkers alone."""

    x: Tensor
    y: Tensor


class KeyedPoison(nn.Module, Poison):
    """A poison for classifiers: x' = x + delta, and delta follows from key, label, seed and what its buffers hold.

    A subclass writes `draw`, and `budget` where a norm bounds it. It is built as
    `SomePoison(config, num_classes=K, image_size=(H, W), seed=seed)`; then `fit` sees the data where `needs_data`.
    Everything it knows sits in buffers: with config and seed they are the whole recipe. A buffer that the seed gives
    back exactly may be non-persistent.
    """

    needs_data: ClassVar[bool] = False
    """Whether `fit` has to see the clean data."""
    draws: ClassVar[bool] = True
    """Whether another seed gives other pixels."""

    last_drawn: Tensor

    def __init__(self, config: Any, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.image_size = (image_size[0], image_size[1])
        self.register_buffer("last_drawn", torch.tensor(EVERYONE))  # a buffer, so that recipes keep it

    @abstractmethod
    def draw(self, batch: Labelled) -> Tensor:
        """x' - x, float32 [B, 3, H, W], of a checked batch: the one thing such a poison must write."""

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fill the buffers that construction leaves open; one pass over the clean data if `needs_data`, else none."""

    def work_in(self, folder: Path | None, device: torch.device) -> None:
        """Called before `fit`: where one that is trained computes, and where it keeps what it takes to go on."""

    def finish(self) -> None:
        """Called when what `fit` made is written: remove what was kept in the folder."""

    def budget(self) -> Radius | None:
        """The radius that x' - x keeps before clipping and rounding."""
        return None

    @torch.no_grad()
    def delta(self, batch: Batch) -> Tensor:
        """x' - x before clipping and rounding, float32 [B, 3, H, W], for batch.x, batch.y and batch.keys.

        Raises ShapeError for pixels of another shape or range, DataError for labels outside the classes.
        """
        checked = self.checked(batch)
        if not len(checked):
            return torch.zeros_like(checked.x)
        chosen = self.chosen(sample_ids(batch.keys).to(checked.x.device))
        return torch.where(chosen[:, None, None, None], self.draw(checked), 0.0)

    # The name is also that of nn.Module.apply(function), which nothing here calls.
    @torch.no_grad()
    def apply(self, batch: Batch) -> Batch:  # type: ignore[override]
        """The batch as it is released: x + delta, clipped to [0, 1] and rounded to the nearest of 256 levels."""
        delta = self.delta(batch)
        x = (cast(Labelled, batch).x + delta).clamp_(0, 1)
        return batch.replace(x=x.mul_(255).round_().div_(255))

    def choose(self, ids: Tensor, ratio: float) -> None:
        """From now on poison exactly floor(ratio * N) of the samples ids int64 [N], drawn by seed, and leave the rest.

        Every id draws a number; those with the smallest are chosen, so one number is all that a recipe has to keep.
        """
        if not 0 <= ratio <= 1:
            raise DataError(
                f"poison {self.name} was asked for a ratio of {ratio}. Give a share of the samples, 0 to 1."
            )
        lots = self._lots(ids).sort().values
        count = math.floor(ratio * len(ids) + 1e-9)  # 0.29 * 100 is 28.999... in binary
        self.last_drawn.fill_(int(lots[count - 1]) if count else -1)

    def chosen(self, ids: Tensor) -> Tensor:
        """Which of the samples ids int64 [B] are poisoned, bool [B]."""
        if self.last_drawn == EVERYONE:
            return torch.ones_like(ids, dtype=torch.bool)
        return self._lots(ids) <= self.last_drawn

    def _lots(self, ids: Tensor) -> Tensor:
        """62 random bits for each id: two samples with the same ones are not to be expected in a lifetime."""
        words = philox_words(2, seed=self.seed, ids=ids, stream=stream_of("poison ratio"))
        return (words[:, 0] << 30) ^ (words[:, 1] >> 2)

    def random(self, batch: Labelled) -> KeyedRandom:
        """Numbers of (seed, key) alone: unlike batch.random the same in every epoch, as released pixels are."""
        return KeyedRandom(self.seed, sample_ids(batch.keys).to(batch.x.device))

    def checked(self, batch: Batch) -> Labelled:
        """The batch itself. Raises ShapeError for pixels of another shape or range, DataError for unknown labels."""
        x = checked_pixels(batch, owner=self.name, size=self.image_size)
        y = batch.y
        if y is None or tuple(y.shape) != (len(batch),) or y.dtype != torch.int64:
            got = "none" if y is None else f"{y.dtype} {list(y.shape)}"
            raise DataError(
                f"poison {self.name} needs one label per sample in batch.y, int64 [{len(batch)}]; the batch has {got}."
            )
        if len(x):
            first, last = (int(v) for v in y.aminmax())
            if first < 0 or last >= self.num_classes:
                raise DataError(
                    f"poison {self.name} got labels {first} to {last}; it was built for {self.num_classes} classes."
                )
        return cast(Labelled, batch)


def checked_pixels(batch: Batch, *, owner: str, size: tuple[int, ...] | None = None) -> Tensor:
    """batch.x, which must be float32 [B, 3, H, W] in [0, 1], of `size` (H, W) if one is given. Raises ShapeError."""
    x = batch.x
    fits = x is not None and x.dim() == 4 and x.shape[:2] == (len(batch), 3) and x.dtype == torch.float32
    if x is None or not fits or (size is not None and tuple(x.shape[2:]) != size):
        got = "no pixels" if x is None else f"{x.dtype} {list(x.shape)}"
        wanted, way_out = "it takes torch.float32 [B, 3, H, W]", "Give pixels in [0, 1]: divide 8-bit levels by 255."
        if size is not None:
            wanted = f"it was built for torch.float32 [B, 3, {size[0]}, {size[1]}]"
            way_out = "Build it with the image_size of the data, or resize the data first."
        raise ShapeError(f"poison {owner} got {got} for {len(batch)} keys; {wanted}.\n  {way_out}")
    low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # NaN too
        raise ShapeError(
            f"poison {owner} got pixels in [{low:.3g}, {high:.3g}]; it takes [0, 1].\n"
            "  Normalize inside the model, after the poison; divide 8-bit levels by 255."
        )
    return x

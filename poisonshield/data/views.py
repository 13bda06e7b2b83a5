"""Views: the training-time augmentation as a stage Batch -> Batch, on the device, per sample.

What a sample draws depends on (run seed, draw, key, view), never on its place in the batch, so runs agree over batch
sizes, ranks and resumption; a shard stream's draw is the epoch. Pipelines follow the VESPR authors' (crop, jitter,
grayscale, blur, flip).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.data import augment as plan
from poisonshield.errors import ConfigError, DataError
from poisonshield.ops import augment, keyed_uniform
from poisonshield.ops.augment import NOTHING
from poisonshield.random import KeyedRandom

_RATIO = (3 / 4, 4 / 3)


class ViewsConfig(Settings):
    """Which augmentation makes the views, and its numbers."""

    name: Literal["auto", "crop_flip", "ssl", "test", "none"] = Field(
        "auto",
        description="auto takes what the method asks for. crop_flip: a random resized crop and mirror, or a shift and "
        "mirror. ssl: random resized crop, jitter (with chance 0.8), grayscale, blur (sigma 0.1 to 2), mirror. test: "
        "shorter side to 256/224 of size, then the middle. none: the pixels as they are.",
    )
    size: int | None = Field(None, ge=1, description="Side of a view in px; null keeps the image's.")
    padding: int = Field(4, ge=0, description="crop_flip without a resized crop: how far images shift, in px.")
    random_resized_crop: Literal["auto"] | bool = Field(
        "auto",
        description="crop_flip: whether it crops and resizes, or shifts; auto shifts where size is the image's and at "
        "most 64 px.",
    )
    min_area: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share of the image in a random resized crop; null is 0.2 for ssl and 0.08 for crop_flip.",
    )
    jitter: float = Field(
        0.4, ge=0, le=1, description="ssl: strength of the change of brightness, contrast and saturation."
    )
    hue: float = Field(
        0.1, ge=0, le=0.5, description="ssl: largest change of the hue, as a share of the colour circle."
    )
    gray_p: float = Field(0.2, ge=0, le=1, description="ssl: chance of a gray view.")
    blur_p: float = Field(0.5, ge=0, le=1, description="ssl: chance of a blurred view.")
    blur_kernel: int | None = Field(
        None,
        ge=1,
        description="ssl: pixels to which the blur's kernel is cut, an odd number, 9 as the VESPR authors generate "
        "poisons; null blurs with the whole Gaussian.",
    )
    count: int | None = Field(None, ge=1, description="Large views of an image; null takes what the method asks for.")
    local: int = Field(0, ge=0, description="Small crops beside the large views (multi-crop), made alike.")
    local_size: int | None = Field(None, ge=1, description="Side of the small crops in px; needed where there are any.")
    local_area: tuple[float, float] = Field(
        (0.05, 0.2),
        description="Least and greatest share of the image in a small crop; the VESPR authors give them the large "
        "ones' shares.",
    )

    @field_validator("blur_kernel")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError(f"{value} has no middle pixel: give an odd number, or null for the whole Gaussian")
        return value

    @model_validator(mode="after")
    def _local_crops_fit(self) -> "ViewsConfig":
        if self.local > 0 and self.local_size is None:
            raise ValueError("local crops need local_size, their side in pixels, such as 96 beside views of 224.")
        if self.local > 0 and self.name in ("none", "test"):
            raise ValueError(f"name {self.name} makes no random crops, so there are no local ones. Set local: 0.")
        if not 0 < self.local_area[0] <= self.local_area[1] <= 1:
            raise ValueError(f"local_area {self.local_area}: two shares of the image, the smaller one first.")
        return self


def _uniforms(rngs: Sequence[KeyedRandom], purpose: str, count: int) -> Tensor:
    """`rng.uniform(purpose, count)` of each, one below the other [V * B, count], in one kernel."""
    ids, seed, offset = rngs[0].ids, rngs[0].seed, rngs[0].offset
    streams = torch.cat([torch.full_like(ids, rng.stream(purpose)) for rng in rngs])
    return keyed_uniform(ids.repeat(len(rngs)), count, seed=seed, offset=offset, stream=streams)


def _each(plans: dict[str, Tensor | None], count: int) -> Iterator[dict[str, Any]]:
    """What was planned [V * B, ...] for `count` views at once, view by view."""
    parts = {name: [None] * count if v is None else v.chunk(count) for name, v in plans.items()}
    return ({name: part[i] for name, part in parts.items()} for i in range(count))


def crop_flip(x: Tensor, rngs: Sequence[KeyedRandom], config: ViewsConfig, max_area: float = 1.0) -> Sequence[Tensor]:
    """A view for each of rngs, for supervised training."""
    size = config.size or x.shape[2]
    resized = config.random_resized_crop
    if resized == "auto":
        resized = size != x.shape[2] or size > 64
    elif not resized and size != x.shape[2]:
        raise ConfigError(
            f"views.random_resized_crop: false keeps the size, but images have {x.shape[2]} rows and views.size asks "
            f"for {size}. Set it to true."
        )
    if not resized:
        shifts = _uniforms(rngs, "crop_flip", 3).chunk(len(rngs))
        return [plan.shifted_crop(x, u, padding=config.padding) for u in shifts]
    u = _uniforms(rngs, "crop_flip", 23)
    boxes = plan.crop_boxes(u, *x.shape[2:], area=(config.min_area or 0.08, max_area), ratio=_RATIO)
    plans: dict[str, Tensor | None] = {"boxes": boxes, "flip": u[:, 22] < 0.5}
    return [augment(x, size=size, **its) for its in _each(plans, len(rngs))]


def ssl(x: Tensor, rngs: Sequence[KeyedRandom], config: ViewsConfig, max_area: float = 1.0) -> Sequence[Tensor]:
    """A view for each of rngs, for self-supervised training."""
    u = _uniforms(rngs, "ssl", 35)
    boxes = plan.crop_boxes(u, *x.shape[2:], area=(config.min_area or 0.2, max_area), ratio=_RATIO)
    # Mirroring commutes with all later operations, so it belongs to the crop.
    plans: dict[str, Tensor | None] = {"boxes": boxes, "flip": u[:, 22] < 0.5}
    if config.jitter > 0 or config.hue > 0:
        plans["factors"], order = plan.jitter(u[:, 24:32], strength=config.jitter, hue=config.hue)
        plans["order"] = torch.where(u[:, 23:24] < 0.8, order, NOTHING)
    if config.gray_p > 0:
        plans["gray"] = u[:, 32] < config.gray_p
    if config.blur_p > 0:
        plans["sigma"] = torch.where(u[:, 33] < config.blur_p, 0.1 + 1.9 * u[:, 34], 0.0)
    size = config.size or x.shape[2]
    return [augment(x, size=size, kernel=config.blur_kernel, **its) for its in _each(plans, len(rngs))]


def center_crop(x: Tensor, rngs: Sequence[KeyedRandom], config: ViewsConfig, max_area: float = 1.0) -> Sequence[Tensor]:
    """The middle of the image, a little closer: the same for every draw."""
    size = config.size or x.shape[2]
    return [plan.resized_center_crop(x, shorter=round(256 / 224 * size), size=size) for _ in rngs]


def none(x: Tensor, rngs: Sequence[KeyedRandom], config: ViewsConfig, max_area: float = 1.0) -> Sequence[Tensor]:
    """The pixels unchanged."""
    return [plan.in_unit(x) for _ in rngs]


_Pipeline = Callable[..., Sequence[Tensor]]
_PIPELINES: dict[str, _Pipeline] = {"crop_flip": crop_flip, "ssl": ssl, "test": center_crop, "none": none}


class Views:
    """The stage: fills `views` with `count` augmentations of `x` and the local crops, in channels-last memory."""

    def __init__(self, config: ViewsConfig, *, default: str, count: int, seed: int) -> None:
        self.config, self.count, self.seed = config, config.count or count, seed
        small = {"size": config.local_size, "min_area": config.local_area[0], "random_resized_crop": True}
        self.local = config.model_copy(update=small)
        self.pipeline = _PIPELINES[default if config.name == "auto" else config.name]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with views [B, 3, S, S] each, large ones first."""
        x = batch.x
        if x is None:
            raise DataError(f"views are made of a batch's pixels, and that of {batch.keys[:1]} has none. Fill its x.")
        rng = batch.random(self.seed, x.device)
        views = [*self.pipeline(x, [rng.within(f"view{i}") for i in range(self.count)], self.config)]
        if self.config.local:
            rngs = [rng.within(f"local{i}") for i in range(self.config.local)]
            views += self.pipeline(x, rngs, self.local, self.config.local_area[1])
        return batch.replace(views=tuple(v.contiguous(memory_format=torch.channels_last) for v in views))

"""Views: the training-time augmentation as a stage Batch -> Batch, on the device, per sample.

What a sample draws depends on (run seed, epoch, key, view), never on its place in the batch, so runs agree over batch
sizes, ranks and resumption. Pipelines follow the VESPR authors' (crop, jitter, grayscale, blur, flip).
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.data import augment
from poisonshield.ops.philox import KeyedRandom

_RATIO = (3 / 4, 4 / 3)


class ViewsConfig(Settings):
    """name: auto takes what the method asks for. size: output side in pixels; null keeps the image's.

    crop_flip: shift by up to `padding` pixels and mirror; images above 64 px get a random resized crop, area 0.08 to 1.
    ssl: random resized crop (area min_area to 1), jitter (p 0.8), grayscale (p gray_p), blur (p blur_p, sigma 0.1
    to 2), mirror.
    none: the pixels as they are.
    """

    name: Literal["auto", "crop_flip", "ssl", "none"] = "auto"
    size: int | None = Field(None, ge=1)
    padding: int = Field(4, ge=0)
    min_area: float = Field(0.2, gt=0, le=1)
    jitter: float = Field(0.4, ge=0, le=1)
    hue: float = Field(0.1, ge=0, le=0.5)
    gray_p: float = Field(0.2, ge=0, le=1)
    blur_p: float = Field(0.5, ge=0, le=1)


def crop_flip(x: Tensor, rng: KeyedRandom, config: ViewsConfig) -> Tensor:
    """One view for supervised training."""
    size = config.size or x.shape[2]
    if x.shape[2] <= 64 and size == x.shape[2]:
        return augment.shifted_crop(x, rng.uniform("crop_flip", 3), padding=config.padding)
    u = rng.uniform("crop_flip", 23)
    boxes = augment.crop_boxes(u, *x.shape[2:], area=(0.08, 1.0), ratio=_RATIO)
    return augment.resized_crop(x, boxes, size, u[:, 22] < 0.5)


def ssl(x: Tensor, rng: KeyedRandom, config: ViewsConfig) -> Tensor:
    """One view for self-supervised training."""
    u = rng.uniform("ssl", 35)
    boxes = augment.crop_boxes(u, *x.shape[2:], area=(config.min_area, 1.0), ratio=_RATIO)
    # Mirroring commutes with all later operations, so it is folded into the crop.
    x = augment.resized_crop(x, boxes, config.size or x.shape[2], u[:, 22] < 0.5)
    if config.jitter > 0 or config.hue > 0:
        rows = (u[:, 23] < 0.8).nonzero()[:, 0]
        x = x.index_copy(0, rows, augment.color_jitter(x[rows], u[rows, 24:32], strength=config.jitter, hue=config.hue))
    if config.gray_p > 0:
        x = torch.where((u[:, 32] < config.gray_p).view(-1, 1, 1, 1), augment.grayscale(x), x)
    if config.blur_p > 0:
        rows = (u[:, 33] < config.blur_p).nonzero()[:, 0]
        x = x.index_copy(0, rows, augment.gaussian_blur(x[rows], 0.1 + 1.9 * u[rows, 34]))
    return x.clamp(0, 1)


def none(x: Tensor, rng: KeyedRandom, config: ViewsConfig) -> Tensor:
    """The pixels unchanged."""
    return x


_Pipeline = Callable[[Tensor, KeyedRandom, ViewsConfig], Tensor]
_PIPELINES: dict[str, _Pipeline] = {"crop_flip": crop_flip, "ssl": ssl, "none": none}


class Views:
    """The stage: fills `views` with `count` augmentations of `x`, in channels-last memory."""

    def __init__(self, config: ViewsConfig, *, default: str, count: int, seed: int) -> None:
        self.config, self.count, self.seed = config, count, seed
        self.pipeline = _PIPELINES[default if config.name == "auto" else config.name]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with views [B, 3, S, S] each."""
        rng = batch.random(self.seed, batch.x.device)
        views = (self.pipeline(batch.x, rng.within(f"view{i}"), self.config) for i in range(self.count))
        return batch.replace(views=tuple(v.contiguous(memory_format=torch.channels_last) for v in views))

"""What a poison was asked to do, as one record that goes through whichever loop it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.errors import DataError, ShapeError
from poisonshield.poisons.diffusion.attack.state import Store

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all), a picture's step counting as one."""


@dataclass(frozen=True)
class Work:
    """The arguments of DiffusionPoison.run, checked."""

    images: Mapping[str, Tensor]
    """uint8 [3, H, W] by key."""
    masks: Mapping[str, Tensor] | None
    """[1, H, W] in [0, 1] by key, for all pictures or none."""
    micro_batch: int
    """Pictures of one size that are computed together."""
    store: Store
    """Where unfinished pictures are kept, or nowhere."""
    save_every: int
    """Steps between two states of a picture."""
    progress: Progress | None
    keep: bool
    """Whether the states of finished pictures stay until the caller has all of them."""

    def __post_init__(self) -> None:
        check_images(self.images, self.masks)


def check_images(images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> None:
    """Raise ShapeError or DataError unless images are uint8 [3, H, W], and masks, if any, [1, H, W] in [0, 1]."""
    for key, image in images.items():
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ShapeError(
                f"picture {key} is {image.dtype} {list(image.shape)}; uint8 [3, H, W], as in its file, is wanted."
            )
        if masks is None:
            continue
        if key not in masks:
            raise DataError(f"picture {key} has no mask, and others have. Give one for every picture, or none.")
        mask = masks[key]
        if tuple(mask.shape) != (1, *image.shape[1:]) or not 0 <= float(mask.min()) <= float(mask.max()) <= 1:
            raise ShapeError(
                f"the mask of {key} is {list(mask.shape)}; [1, {image.shape[1]}, {image.shape[2]}] in [0, 1] is wanted."
            )

"""TrivialAugment: one operation for each picture, drawn from twelve, of a strength drawn from its range.

Source: Mueller and Hutter 2021; operations and ranges are those of the library that UEraser's authors use. Brightness
adds and contrast multiplies, as there. Fewest bits of posterize are 1, not 0, which would be a black picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.random import KeyedRandom

RANGES = {
    "auto_contrast": (0.0, 1.0),
    "equalize": (0.0, 1.0),
    "rotate": (-30.0, 30.0),  # degrees
    "posterize": (1.0, 5.0),  # bits, rounded down
    "solarize": (0.0, 1.0),
    "contrast": (0.1, 1.9),
    "brightness": (0.1, 1.9),
    "sharpness": (0.1, 1.9),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.5, 0.5),  # of the width
    "translate_y": (-0.5, 0.5),
}
NAMES = tuple(RANGES)


def trivial_augment(x: Tensor, rng: KeyedRandom) -> Tensor:
    """x [B, 3, H, W] in [0, 1], each picture changed by one operation."""
    u = rng.uniform("trivial", 2)
    which = (u[:, 0] * len(NAMES)).long()
    low, high = torch.tensor(tuple(RANGES.values()), device=x.device)[which].unbind(1)
    return apply_operations(x, which, low + (high - low) * u[:, 1])


def apply_operations(x: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    """x with operation NAMES[which[b]] on picture b, int64 [B]; strength [B], in the operation's own unit.

    All operations run on all pictures, for a choice by picture would have to wait for the device.
    """
    amount = strength.view(-1, 1, 1, 1).to(x.dtype)
    made = {
        "auto_contrast": stretch(x),
        "equalize": equalize(x),
        "posterize": torch.floor(x * 255 / 2 ** (8 - amount.floor())) * 2 ** (8 - amount.floor()) / 255,
        "solarize": torch.where(x >= amount, 1 - x, x),
        "contrast": (x * amount).clamp(0, 1),
        "brightness": (x + amount - 1).clamp(0, 1),
        "sharpness": sharpen(x, amount),
    }
    out = move(x, which, strength)
    for name, value in made.items():
        out = torch.where((which == NAMES.index(name)).view(-1, 1, 1, 1), value, out)
    return out


def stretch(x: Tensor) -> Tensor:
    """Each channel from its own lowest and highest value to 0 and 1; a flat one stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-12), x)


def equalize(x: Tensor) -> Tensor:
    """Each channel with its 256 levels about equally often, by Pillow's rule."""
    levels = (x * 255).round().long().clamp(0, 255).flatten(2)  # [B, 3, n]
    counts = torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = (255 - counts.flip(2).ne(0).to(torch.uint8).argmax(2, keepdim=True)).long()  # the highest level that occurs
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp_min(1)).clamp(0, 255)
    made = table.gather(2, levels).view_as(x).to(x.dtype) / 255
    return torch.where((step == 0)[..., None], x, made)


def sharpen(x: Tensor, amount: Tensor) -> Tensor:
    """amount x + (1 - amount) smooth(x), clipped; the border, which has no neighbours, stays."""
    kernel = torch.ones((3, 1, 3, 3), dtype=x.dtype, device=x.device)
    kernel[:, :, 1, 1] = 5
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=3)
    return (smooth + amount * (x - smooth)).clamp(0, 1)


def move(x: Tensor, which: Tensor, strength: Tensor) -> Tensor:
    """Rotation, shear or shift about the centre, bilinear, with black from outside; other pictures as they are."""
    height, width = x.shape[2:]

    def of(name: str) -> Tensor:
        return torch.where(which == NAMES.index(name), strength, 0.0)

    angle = of("rotate") * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    # Where a pixel of the result comes from, in the units of affine_grid: half a picture's side is 1.
    top = torch.stack([cos, -sin * height / width - of("shear_x") * height / width, -2 * of("translate_x")], 1)
    low = torch.stack([sin * width / height - of("shear_y") * width / height, cos, -2 * of("translate_y")], 1)
    grid = F.affine_grid(torch.stack([top, low], 1).to(x.dtype), [*x.shape], align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False).clamp(0, 1)
    names = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    moves = torch.stack([which == NAMES.index(name) for name in names]).any(0)
    return torch.where(moves.view(-1, 1, 1, 1), moved, x)

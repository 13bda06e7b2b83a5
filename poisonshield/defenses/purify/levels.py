"""Pixels as a file of 8 bits holds them: every purifier answers with such, so that training on the fly equals files."""

from torch import Tensor


def levels(x: Tensor) -> Tensor:
    """x in [0, 1] as whole levels 0..255, rounded to the nearest: cutting off would darken by half a level."""
    return (x.clamp(0, 1) * 255).round()


def pixels(levels: Tensor) -> Tensor:
    """Levels 0..255, not necessarily whole, as pixels in [0, 1] on the 256 levels."""
    return levels.round().clamp(0, 255) / 255

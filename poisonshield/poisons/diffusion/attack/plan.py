"""Pictures of any size: reflected up to a size that the networks take, and cut into tiles where they are large.

Tiles overlap and share one perturbation: a step visits all of them and adds up their gradients, so there is no seam
where two perturbations meet. `fold` is the adjoint of `reflect`, so a gradient at the padded size becomes one at the
picture's own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.errors import ConfigError

BLOCK = 16
"""Tiles begin at multiples of it, so that the blocks of a JPEG lie in a tile as they do in the picture."""


@dataclass(frozen=True)
class Box:
    """A tile: its corner and size in the padded picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, *, per: int = 1) -> Tensor:
        """The part of x [..., H', W'] (or of latents, with `per` pixels a cell) that the box covers; a view."""
        return x[
            ..., self.top // per : (self.top + self.height) // per, self.left // per : (self.left + self.width) // per
        ]


@dataclass(frozen=True)
class Plan:
    """How pictures of `size` (H, W) are seen: padded on the right and below to `padded`, in `boxes`."""

    size: tuple[int, int]
    padded: tuple[int, int]
    boxes: tuple[Box, ...]


def plan_of(size: tuple[int, int], *, multiple: int, tile: int | None = None, overlap: int = 0) -> Plan:
    """The plan for pictures of `size`.

    multiple: what each side must be a multiple of. tile: the largest side seen at once.
    Neighbouring tiles share at least `overlap` pixels. Raises ConfigError for a tile that is no multiple of 16 and of
    `multiple`, or not larger than the overlap.
    """
    unit = math.lcm(multiple, BLOCK)
    if tile is None or max(size) <= tile:
        height, width = (_up(side, multiple) for side in size)
        return Plan(size, (height, width), (Box(0, 0, height, width),))
    if tile % unit or overlap >= tile or overlap < 0:
        raise ConfigError(
            f"tile {tile} with overlap {overlap} does not fit this pipeline: a multiple of {unit} that is larger than "
            f"the overlap is wanted, for example {max(unit, tile // unit * unit)} with {unit}."
        )
    height, width = (_up(side, unit if side > tile else multiple) for side in size)
    rows, columns = (_spans(side, tile, overlap, unit) for side in (height, width))
    return Plan(size, (height, width), tuple(Box(y, x, h, w) for y, h in rows for x, w in columns))


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _spans(side: int, tile: int, overlap: int, unit: int) -> list[tuple[int, int]]:
    """(start, length) of tiles along one side; the last one ends where the side does."""
    if side <= tile:
        return [(0, side)]
    # The last tile is moved back instead of cut, since a network may not take what is left.
    stride = max(unit, (tile - overlap) // unit * unit)
    return [(start, tile) for start in range(0, side - tile, stride)] + [(side - tile, tile)]


def reflect(x: Tensor, padded: tuple[int, int]) -> Tensor:
    """x [..., H, W] mirrored on its right and lower edge up to `padded`, as often as that takes."""
    for dim, length in zip((-2, -1), padded, strict=True):
        if x.shape[dim] != length:
            x = x.index_select(dim, _mirror(x.shape[dim], length, x.device))
    return x


def fold(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient [..., H, W] for the pixels that `reflect` repeated in grad [..., H', W']."""
    for dim, length in zip((-1, -2), reversed(size), strict=True):
        if grad.shape[dim] != length:
            shape = list(grad.shape)
            shape[dim] = length
            where = _mirror(length, grad.shape[dim], grad.device)
            grad = grad.new_zeros(shape).index_add_(dim, where, grad)
    return grad


def _mirror(length: int, padded: int, device: torch.device) -> Tensor:
    """0 1 2 ... length-1 length-2 ... 1 0 1 ..., `padded` numbers."""
    period = max(1, 2 * length - 2)
    at = torch.arange(padded, device=device) % period
    return torch.minimum(at, period - at) if length > 1 else torch.zeros_like(at)

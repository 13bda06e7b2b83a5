"""Perturbations of low frequency: the lowest k x k bins of the cosine transform of every 8 x 8 block.

JPEG rounds high bins away first, so what is limited to low ones survives it better. Blocks lie where JPEG's do, from
the upper left corner of the picture.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8


@cache
def cosines() -> Tensor:
    """The orthonormal cosine transform [8, 8], float64; row k is bin k."""
    n, k = torch.arange(SIDE, dtype=torch.float64), torch.arange(SIDE, dtype=torch.float64)[:, None]
    rows = torch.cos(math.pi * (2 * n + 1) * k / (2 * SIDE)) * math.sqrt(2 / SIDE)
    rows[0] = 1 / math.sqrt(SIDE)
    return rows


def low_pass(x: Tensor, bins: int) -> Tensor:
    """x [B, C, H, W] without what lies outside the lowest bins x bins of each block; same shape and dtype.

    Blocks that the edge cuts are completed by repeating the edge, so in those the result is only nearly limited.
    """
    low = cosines()[:bins].to(x)
    keep = low.T @ low  # [8, 8]: onto the bins and back
    blocks = _blocks(x)
    return _picture(keep @ blocks @ keep, x.shape[2:])


def shorten_blocks(delta: Tensor, eps: float) -> Tensor:
    """delta [B, C, H, W] with each 8 x 8 block of a channel scaled to at most eps: unlike clipping it keeps bins."""
    blocks = _blocks(delta)
    size = blocks.abs().amax((-2, -1), keepdim=True)
    # A block of zeros gives infinity, which the clamp makes 1.
    return _picture(blocks * (eps / size).clamp(max=1.0), delta.shape[2:])


def share_within(delta: Tensor, bins: int) -> float:
    """How much of the energy of delta [B, C, H, W] lies in the lowest bins, from 0 to 1; 1 of nothing."""
    total = delta.double().square().sum()
    return float(low_pass(delta.double(), bins).square().sum() / total) if total > 0 else 1.0


def _blocks(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, rows, columns, 8, 8]."""
    x = F.pad(x, (0, -x.shape[3] % SIDE, 0, -x.shape[2] % SIDE), mode="replicate")
    return x.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE)).transpose(3, 4)


def _picture(blocks: Tensor, size: torch.Size) -> Tensor:
    whole = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[..., : size[0], : size[1]]

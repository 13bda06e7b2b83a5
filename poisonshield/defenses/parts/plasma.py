"""Plasma: clouds of every size, by the diamond-square rule. Source: Fournier et al. 1982, in the form of UEraser's.

A grid of 3 x 3 random numbers is doubled until it covers the picture. Each new point is (1 - s) times the mean of its
neighbours plus s times a random number, s being the roughness, its square, its cube and so on as the grid gets finer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.random import KeyedRandom


def draw_plasma(rng: KeyedRandom, size: tuple[int, int, int], roughness: Tensor, purpose: str) -> Tensor:
    """Clouds [B, C, H, W], each channel of each sample stretched to [0, 1]. size: C, H, W; roughness [B] in [0, 1]."""
    channels, height, width = size
    doublings = max(0, math.ceil(math.log2(max(height, width, 3) - 1)) - 1)
    side = 2 ** (doublings + 1) + 1

    def fresh(level: int, length: int) -> Tensor:
        return rng.uniform(f"{purpose}/{level}", channels * length**2).view(-1, channels, length, length)

    grid = fresh(0, 3)
    for level in range(1, doublings + 1):
        scale = roughness.view(-1, 1, 1, 1) ** level
        grid = double(grid, fresh(level, 2 ** (level + 1) + 1), scale)
    assert grid.shape[2] == side
    cloud = grid[:, :, :height, :width]
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    return (cloud - low) / (high - low).clamp_min(1e-6)


def double(grid: Tensor, fresh: Tensor, scale: Tensor) -> Tensor:
    """The grid [B, C, n, n] at twice the resolution, [B, C, 2n - 1, 2n - 1]; fresh has that shape, scale [B, 1, 1, 1].

    First the middles of squares, from their four corners; then the middles of edges, from the three or four points
    that lie next to them.
    """
    new = torch.zeros_like(fresh)
    new[:, :, ::2, ::2] = grid
    corners = (grid[:, :, :-1, :-1] + grid[:, :, 1:, :-1] + grid[:, :, :-1, 1:] + grid[:, :, 1:, 1:]) / 4
    new[:, :, 1::2, 1::2] = (1 - scale) * corners + scale * fresh[:, :, 1::2, 1::2]
    around, ones = F.pad(new, (1, 1, 1, 1)), F.pad(torch.ones_like(new[:1, :1]), (1, 1, 1, 1))
    total, count = (
        v[:, :, :-2, 1:-1] + v[:, :, 2:, 1:-1] + v[:, :, 1:-1, :-2] + v[:, :, 1:-1, 2:] for v in (around, ones)
    )
    edges = (1 - scale) * total / count + scale * fresh
    for rows, columns in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        new[:, :, rows, columns] = edges[:, :, rows, columns]
    return new

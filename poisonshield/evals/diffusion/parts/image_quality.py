"""How far pictures moved from the ones they came from: PSNR, SSIM, levels.

Differences are measured on the 8-bit pixels that a file holds, so that files alone reproduce every number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError


def difference(x: Tensor, original: Tensor) -> dict[str, float | None]:
    """How far pictures [N, 3, H, W] in [0, 1] moved from their originals, both rounded to 8 bits; means over pictures.

    psnr in dB, over pictures that differ at all, None if none does; ssim in [-1, 1]; max_levels, the largest over all
    pictures, and mean_levels, of 8 bits. Raises ShapeError if shapes differ, or are under 11 pixels a side.
    """
    a, b = levels_of(x), levels_of(original)
    _same(a, b)
    decibels = psnr(a / 255, b / 255)
    finite = decibels[decibels.isfinite()]
    apart = (a - b).abs()
    return {
        "psnr": float(finite.mean()) if len(finite) else None,
        "ssim": float(ssim(a / 255, b / 255).mean()),
        "max_levels": float(apart.max()),
        "mean_levels": float(apart.mean()),
    }


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of pictures [N, 3, H, W] in [0, 1]; infinite where two are equal."""
    _same(x, y)
    return -10 * (x - y).double().square().flatten(1).mean(1).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity [N] of pictures [N, C, H, W] in [0, 1], per channel, then averaged.

    Gaussian window of 11 pixels, standard deviation 1.5, only where it fits inside. Raises ShapeError below 11 pixels.
    Source: Wang et al. 2004.
    """
    _same(x, y)
    if min(x.shape[2:]) < 11:
        raise ShapeError(f"pictures {tuple(x.shape[2:])} are smaller than SSIM's window of 11 pixels.")
    x, y = x.double(), y.double()
    line = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.double, device=x.device) / 1.5) ** 2)
    line = line / line.sum()

    def smooth(v: Tensor) -> Tensor:
        flat = v.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
        return flat.view(*v.shape[:2], *flat.shape[2:])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    out = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return out.mean((1, 2, 3))


def levels_of(x: Tensor) -> Tensor:
    """Pixels as a file holds them, float 0 to 255. Raises ShapeError for no picture."""
    if x.dim() != 4 or x.shape[1] != 3 or not len(x):
        raise ShapeError(f"pictures have shape {tuple(x.shape)}; [N, 3, H, W] with at least one is wanted.")
    return (x.float().clamp(0, 1) * 255).round()


def _same(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dim() != 4:
        raise ShapeError(f"pictures {tuple(x.shape)} and {tuple(y.shape)}: two equal shapes [N, C, H, W] are wanted.")

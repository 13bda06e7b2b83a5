"""From a map of how much to a mask of what. Source: Otsu 1979."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BINS = 256


def otsu(values: Tensor) -> float:
    """The threshold that parts the values into two classes with the means furthest apart (largest variance between)."""
    low, high = float(values.min()), float(values.max())
    values = values.detach().cpu().flatten().double()  # one device, so that a mask is the same everywhere
    share = torch.histc(values, _BINS, min=low, max=high) / values.numel()
    middles = low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (high - low) / _BINS
    below, moment = share.cumsum(0), (share * middles).cumsum(0)
    between = (moment[-1] * below - moment).square() / (below * (1 - below))
    return float(middles[between.nan_to_num(0.0, posinf=0.0).argmax()])


def cut(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [B, 1, H, W], 0 or 1, of maps [B, 1, h, w] brought to `size` (H, W): what exceeds each map's own threshold.

    A map that is the same everywhere tells nothing and gives an empty mask.
    """
    maps = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
    flat = [bool(m.max() <= m.min()) for m in maps]
    return torch.stack(
        [torch.zeros_like(m) if same else (m > otsu(m)).to(m) for m, same in zip(maps, flat, strict=True)]
    )

"""Textures of the lessons: grounds of noise, and paint in one colour or several.

All draws come from the generator handed in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_grounds(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Colour noise [count, 3, side, side] in [0, 1] whose amplitude falls as 1/f^0.8 to 1/f^2.2 about a mean colour."""
    u = torch.rand(2, count, 1, 1, 1, generator=generator)
    mean = 0.15 + 0.7 * torch.rand(count, 3, 1, 1, generator=generator)
    return (mean + (0.05 + 0.13 * u[0]) * draw_noise(count, 3, side, 0.8 + 1.4 * u[1], generator)).clamp(0, 1)


def draw_mixtures(count: int, side: int, tones: Tensor, generator: torch.Generator) -> Tensor:
    """Paint [count, 3, side, side] of two to four of `tones` [K, 3] in fine or coarse patches."""
    tones = tones[torch.rand(count, len(tones), generator=generator).argsort(1)[:, :4]]  # [count, 4, 3]
    scale = 0.2 + 1.6 * torch.rand(count, 1, 1, 1, generator=generator)
    pick = draw_noise(count, tones.shape[1], side, scale, generator)
    pick[:, 2:] -= 10 * (torch.rand(count, pick.shape[1] - 2, 1, 1, generator=generator) < 0.5)
    chosen = F.one_hot(pick.argmax(1), pick.shape[1]).float()  # [count, side, side, 4]
    return torch.einsum("bhwk,bkc->bchw", chosen, tones)


def paint_area(paint: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One colour a picture [B, 3] as an area [B, 3, side, side] with a little unevenness."""
    uneven = draw_noise(len(paint), 1, side, torch.full((1, 1, 1, 1), 1.5), generator)
    return (paint[:, :, None, None] + 0.04 * draw_some(len(paint), 0.5, generator)[:, None, None, None] * uneven).clamp(
        0, 1
    )


def draw_noise(count: int, channels: int, side: int, falloff: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of standard deviation 1 and mean 0, whose amplitude falls as 1/f^falloff [count or 1, 1, 1, 1]."""
    f = torch.sqrt(torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None, :] ** 2)
    f[0, 0] = math.inf
    white = torch.randn(count, channels, side, side, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * f**-falloff, s=(side, side))
    return noise / noise.std((2, 3), keepdim=True)


def draw_some(count: int, share: float, generator: torch.Generator) -> Tensor:
    """[count], uniform in (0, 1) for about `share` of them and 0 for the others."""
    u = torch.rand(2, count, generator=generator)
    return torch.where(u[0] < share, u[1], torch.zeros(()))

"""Changes to masks and pictures of the lessons: swollen, broken or cut masks, shuffled tiles, and a decoder's softness.

All draws come from the generator handed in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.world.judge_textures import draw_noise, draw_some


def swell(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] one pixel thinner, as they are, or one or two pixels thicker all around."""
    thicker = F.max_pool2d(mask, 3, 1, 1)
    forms = torch.stack([-F.max_pool2d(-mask, 3, 1, 1), mask, thicker, F.max_pool2d(thicker, 3, 1, 1)])
    return forms[torch.randint(4, (len(mask),), generator=generator), torch.arange(len(mask))]


def break_up(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] that lost 35 to 70 % of their area in pieces a few pixels wide."""
    count, side = len(mask), mask.shape[-1]
    scale = 1.0 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = draw_noise(count, 1, side, scale, generator)
    inside = torch.where(mask > 0.5, noise, torch.full((), math.nan)).flatten(1)
    lost = 0.35 + 0.35 * torch.rand(count, generator=generator)
    level = torch.stack([row.nanquantile(float(q)) for row, q in zip(inside, lost, strict=True)]).view(count, 1, 1, 1)
    return mask * (noise > level)


def cut(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] with one side cut off, a round bite taken out, or a broad band through the middle gone.

    A third of the area or more is lost, as a rule. A straight cut may leave a small triangle of a triangle: rarely.
    """
    count, side = len(mask), mask.shape[-1]
    line = torch.arange(side) + 0.5
    area = mask.sum((2, 3)).clamp(min=1)
    across_x, across_y = (mask * line).sum((2, 3)) / area, (mask * line[:, None]).sum((2, 3)) / area
    center = torch.stack([across_x, across_y])[..., None, None]
    radius = (area / math.pi).sqrt()[..., None, None]
    angle = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=generator)
    dx, dy = line - center[0], line[:, None] - center[1]
    along = torch.cos(angle) * dx + torch.sin(angle) * dy
    across = torch.cos(angle) * dy - torch.sin(angle) * dx
    u = torch.rand(3, count, 1, 1, 1, generator=generator)
    edge = radius * (0.5 * u[0] - 0.25)  # where a cut or bite ends, from the middle
    bite = radius * (0.8 + 0.8 * u[1])
    halved = along > edge
    bitten = (along - edge + bite) ** 2 + across**2 > bite**2
    parted = along.abs() > radius * (0.3 + 0.25 * u[0])
    return mask * torch.where(u[2] < 0.3, halved, torch.where(u[2] < 0.65, bitten, parted))


def draw_blobs(mask: Tensor, generator: torch.Generator) -> Tensor:
    """In place of masks [B, 1, H, H], many rounded pieces that cover 10 to 50 % of the picture."""
    count, side = len(mask), mask.shape[-1]
    noise = draw_noise(count, 1, side, 1.2 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator), generator)
    share = 0.5 + 0.4 * torch.rand(count, generator=generator)
    level = torch.stack([row.quantile(float(q)) for row, q in zip(noise.flatten(1), share, strict=True)])
    return (noise > level.view(count, 1, 1, 1)).float()


def shuffle(x: Tensor, generator: torch.Generator, *, tile: int = 8) -> Tensor:
    """Pictures [B, C, H, H] with their tiles in another order. H a multiple of tile."""
    count, channels, side, _ = x.shape
    tiles = F.unfold(x, tile, stride=tile)  # [B, C * tile^2, n]
    order = torch.rand(count, tiles.shape[-1], generator=generator).argsort(1)
    return F.fold(tiles.gather(2, order[:, None].expand_as(tiles)), (side, side), tile, stride=tile)


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a small decoder gives them, [B, 3, H, H] in [0, 1]: turned, warped, blurred, shifted in tone, noisy.

    Width and height change by up to 12 % each. The rest happens to some: warp by up to 1.5 pixels, Gaussian blur of 0.5
    to 1.5 pixels, gain and offset of 5 %, noise of up to 0.03. Only what leaves an object what it is.
    """
    count, side = len(x), x.shape[-1]
    if bool(torch.rand((), generator=generator) < 0.5):
        x = x.flip(3)
    x = torch.rot90(x, int(torch.randint(4, (), generator=generator)), (2, 3))
    x = warp(x, 1.5 * draw_some(count, 0.5, generator), generator)
    x = blur(x, 0.5 + torch.rand(count, generator=generator), draw_some(count, 0.6, generator) > 0)
    u = torch.rand(2, count, 1, 1, 1, generator=generator) - 0.5
    x = (x - 0.5) * (1 + 0.1 * u[0]) + 0.5 + 0.1 * u[1]
    noise = torch.randn(count, 3, side, side, generator=generator)
    return (x + 0.03 * draw_some(count, 0.5, generator)[:, None, None, None] * noise).clamp(0, 1)


def warp(x: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """x stretched about its middle by 0.88 to 1.12, its pixels moved along a smooth field.

    amount [B]: twice the field's standard deviation, in pixels.
    """
    count, side = len(x), x.shape[-1]
    field = draw_noise(count, 2, side, torch.full((1, 1, 1, 1), 2.5), generator) * amount[:, None, None, None] / 2
    stretch = torch.diag_embed(0.88 + 0.24 * torch.rand(count, 2, generator=generator))
    affine = torch.cat([stretch, torch.zeros(count, 2, 1)], dim=2)
    plain = F.affine_grid(affine, [count, 1, side, side], align_corners=False)
    # Coordinates of a grid run from -1 to 1 over the picture, so a pixel is 2 / side.
    grid = plain + field.permute(0, 2, 3, 1) * (2 / side)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def blur(x: Tensor, sigma: Tensor, chosen: Tensor) -> Tensor:
    """Gaussian blur of standard deviation sigma [B] pixels where chosen [B]."""
    line = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (line / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)  # [B * C, 9]
    flat = F.pad(x.flatten(0, 1)[None], (4, 4, 4, 4), mode="reflect")  # [1, B * C, H + 8, H + 8]
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return torch.where(chosen[:, None, None, None], flat.view_as(x), x)

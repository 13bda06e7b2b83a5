"""Augmentations on batches of tensors, every sample with its own parameters. Differentiable in the pixels.

All take x [B, 3, H, W] in [0, 1] and per-sample uniforms u [B, n] in [0, 1), and return pixels in [0, 1] of the dtype
of x. Nothing here draws random numbers, so the caller decides what they depend on (seed, draw, key). Crops and blurs
are two batched matrix products with per-sample matrices: exact antialiased bilinear resampling, at B*(H*S + W*S) extra
floats. Coordinates, weights and colours are computed in float32 at least, so that bfloat16 costs pixels only.
Sources: torchvision's transforms for the meaning of each parameter.
"""

import math

import torch
from torch import Tensor

from poisonshield.ops.precision import at_least_float32

LUMA = (0.299, 0.587, 0.114)


def crop_boxes(u: Tensor, height: int, width: int, *, area: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Boxes (top, left, h, w) of random resized crops, float32 [B, 4] holding integers. Takes u [B, 22].

    Up to ten draws of area share and aspect ratio, the first that fits counts; the centre is taken if none does.
    """
    share = area[0] + (area[1] - area[0]) * u[:, 0:10]
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[:, 10:20])
    w = torch.round(torch.sqrt(share * height * width * aspect))
    h = torch.round(torch.sqrt(share * height * width / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)  # [B, 10]
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fallback_w = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    fallback_h = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    any_fits = fits.any(1)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], torch.full_like(share[:, 0], fallback_w))
    h = torch.where(any_fits, h.gather(1, first)[:, 0], torch.full_like(share[:, 0], fallback_h))
    centred_top, centred_left = torch.floor((height - h) / 2), torch.floor((width - w) / 2)
    top = torch.where(any_fits, torch.floor(u[:, 20] * (height - h + 1)), centred_top)
    left = torch.where(any_fits, torch.floor(u[:, 21] * (width - w + 1)), centred_left)
    return torch.stack([top, left, h, w], dim=1)


def _resampling(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Rows of weights [B, target, source]: antialiased bilinear from [start, start + length) to target pixels."""
    scale = (length / target)[:, None, None]
    support = scale.clamp(min=1.0)
    centre = start[:, None, None] + (torch.arange(target, device=start.device) + 0.5)[None, :, None] * scale
    pixel = torch.arange(source, device=start.device)[None, None, :]
    weight = (1 - ((pixel + 0.5 - centre) / support).abs()).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def _apply(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T per sample and channel: [B, S, H], [B, 3, H, W], [B, T, W] -> [B, 3, S, T].

    rows and columns may be one for all samples, [1, S, H]."""
    rows, columns = rows.to(x.dtype), columns.to(x.dtype)
    return torch.matmul(torch.matmul(rows[:, None], x), columns[:, None].transpose(2, 3))


def resized_crop(x: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop each box [B, 4] and resize it to size x size; mirror where flip [B] bool is set."""
    rows = _resampling(boxes[:, 0], boxes[:, 2], x.shape[2], size)
    columns = _resampling(boxes[:, 1], boxes[:, 3], x.shape[3], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _apply(rows, x, columns)


def resized_center_crop(x: Tensor, *, shorter: int, size: int) -> Tensor:
    """Resize the shorter side to `shorter`, then take the middle size x size (no larger than `shorter`)."""
    least = min(x.shape[2:])

    def matrix(source: int) -> Tensor:
        target = shorter * source // least
        whole = torch.tensor([[0.0], [source]], device=x.device)
        first = round((target - size) / 2)  # half to even, as torchvision does
        return _resampling(whole[0], whole[1], source, target)[:, first : first + size]

    return _apply(matrix(x.shape[2]), x, matrix(x.shape[3]))


def shifted_crop(x: Tensor, u: Tensor, *, padding: int) -> Tensor:
    """Pad with black, crop back to the old size at a random place, mirror half of them. Takes u [B, 3]."""
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, [padding] * 4)
    rows = (u[:, :1] * (2 * padding + 1)).long() + torch.arange(height, device=x.device)  # [B, H]
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns) + (u[:, 1:2] * (2 * padding + 1)).long()
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # channels-last memory


def grayscale(x: Tensor) -> Tensor:
    """The luma in all three channels."""
    weights = torch.tensor(LUMA, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True).expand_as(x)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift [B] (1 is a full turn), through HSV."""
    dtype, x = x.dtype, at_least_float32(x)
    value, _ = x.max(1)
    spread = value - x.min(1).values
    safe = spread.clamp(min=1e-8)
    r, g, b = x.unbind(1)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = hue + 6 * shift.view(-1, 1, 1)
    turns = torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    k = turns + hue[:, None]
    k = k - 6 * torch.floor(k / 6)
    return (value[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).to(dtype)


def jitter_parameters(u: Tensor, *, strength: float, hue: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of brightness, contrast and saturation [B, 3], hue turns [B], and the order of the four [B, 4].

    Takes u [B, 8]."""
    return 1 + strength * (2 * u[:, :3] - 1), hue * (2 * u[:, 3] - 1), u[:, 4:8].argsort(1)


def color_jitter(x: Tensor, u: Tensor, *, strength: float, hue: float) -> Tensor:
    """Brightness, contrast and saturation by factors in 1 +- strength, hue by +- hue turns, in random order.

    Takes u [B, 8]."""
    dtype, x = x.dtype, at_least_float32(x)
    factor, turn, order = jitter_parameters(u.to(x.dtype), strength=strength, hue=hue)
    for place in range(4):
        which = order[:, place].view(-1, 1, 1, 1)  # 0 brightness, 1 contrast, 2 saturation, 3 hue
        gray = grayscale(x)[:, :1]
        other = torch.where(which == 1, gray.mean((2, 3), keepdim=True), torch.where(which == 2, gray, 0.0))
        kept = factor.gather(1, order[:, place : place + 1].clamp(max=2)).view(-1, 1, 1, 1)
        x = torch.where(which == 3, x, (other + kept * (x - other)).clamp(0, 1))
        rows = (order[:, place] == 3).nonzero()[:, 0]
        x = x.index_copy(0, rows, shift_hue(x[rows], turn[rows]))
    return x.to(dtype)


def gaussian_blur(x: Tensor, sigma: Tensor, *, kernel: int | None = None) -> Tensor:
    """Gaussian of standard deviation sigma [B] in pixels. sigma 0 is the identity.

    kernel None: the whole Gaussian, its weights renormalized at the border. An odd number: cut to that many pixels and
    mirrored at the border, which is torchvision's gaussian_blur where kernel // 2 is below the image's sides.
    """

    def matrix(size: int) -> Tensor:
        at = torch.arange(size, device=x.device, dtype=sigma.dtype)
        here, there = at[:, None], at[None, :]
        weight = gauss(here - there)
        if kernel is not None:  # the images of each pixel in the mirrors at 0 and at size - 1
            weight = weight + gauss(here + there) * (there > 0)
            weight = weight + gauss(2 * (size - 1) - here - there) * (there < size - 1)
        return weight / weight.sum(2, keepdim=True)

    def gauss(distance: Tensor) -> Tensor:
        weight = torch.exp(-distance.square() / (2 * sigma.clamp(min=1e-3).square()[:, None, None]))
        return weight if kernel is None else weight * (distance.abs() <= kernel // 2)

    return _apply(matrix(x.shape[2]), x, matrix(x.shape[3]))

"""What augmentations do to each sample, planned from uniforms: crops, and changes of colour. `ops.augment` does it.

All take per-sample uniforms u [B, n] in [0, 1) and draw nothing, so the caller decides what they depend on (seed, draw,
key). Sources: torchvision's transforms for the meaning of each parameter.
"""

import math

import torch
from torch import Tensor

from poisonshield.ops import augment


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


def jitter(u: Tensor, *, strength: float, hue: float) -> tuple[Tensor, Tensor]:
    """Factors [B, 4] of brightness, contrast and saturation and turns of the hue, and the order of the four [B, 4].

    Takes u [B, 8]."""
    amounts = 2 * u[:, :4] - 1
    return torch.cat([1 + strength * amounts[:, :3], hue * amounts[:, 3:]], dim=1), u[:, 4:8].argsort(1)


def resized_center_crop(x: Tensor, *, shorter: int, size: int) -> Tensor:
    """Resize the shorter side to `shorter`, then take the middle size x size (no larger than `shorter`)."""
    height, width = x.shape[2:]
    boxes = torch.zeros((len(x), 4), device=x.device)
    boxes[:, 2].fill_(height)
    boxes[:, 3].fill_(width)
    least = min(height, width)
    return augment(x, boxes, size=size, grid=(shorter * height // least, shorter * width // least))


def in_unit(x: Tensor) -> Tensor:
    """uint8 levels as float32 in [0, 1]; floats as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def shifted_crop(x: Tensor, u: Tensor, *, padding: int) -> Tensor:
    """Pad with black, crop back to the old size at a random place, mirror half of them. Takes u [B, 3].

    Of uint8 levels, float32 in [0, 1]: they are moved as bytes.
    """
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, [padding] * 4)
    rows = (u[:, :1] * (2 * padding + 1)).long() + torch.arange(height, device=x.device)  # [B, H]
    columns = torch.arange(width, device=x.device).expand(len(x), width)
    columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns) + (u[:, 1:2] * (2 * padding + 1)).long()
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    moved = padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # channels-last memory
    return in_unit(moved)

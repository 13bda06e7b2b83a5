"""A view of an image in plain PyTorch: crop, colours, blur, each sample with parameters of its own. Differentiable.

Nothing here draws: the parameters say what happens, so the caller decides what they depend on (seed, draw, key). Crops
and blurs are two batched matrix products with per-sample matrices: exact antialiased bilinear resampling, at
B*(H*S + W*S) extra floats. Everything is computed in float32 at least, so that half precision costs pixels only. What
only some samples ask for is done to all and chosen by `where`: finding them would wait for a GPU.
Sources: torchvision's transforms for the meaning of each parameter.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poisonshield.random import philox_uniform

LUMA = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)


class AugmentArguments(NamedTuple):
    """What `augment` takes."""

    x: Tensor  # [B, 3, H, W], floats in [0, 1], or uint8 levels
    boxes: Tensor  # [B, 4] float: top, left, height, width of the crop, in whole pixels
    flip: Tensor | None  # bool [B], whether it is mirrored
    factors: Tensor | None  # float [B, 4]: factors of brightness, contrast, saturation; turns of the hue
    order: Tensor | None  # int64 [B, 4], given if factors are: which change comes at each place, NOTHING for none
    gray: Tensor | None  # bool [B], whether only the luma is left
    sigma: Tensor | None  # float [B], standard deviation of the blur in pixels; 0 for none
    kernel: int  # an odd number of pixels to which the blur is cut, with a mirrored border; 0 for the whole Gaussian
    grid_height: int  # rows to which a whole box would be resized; the middle size x size of them is the view
    grid_width: int  # and columns
    size: int  # S
    out_dtype: torch.dtype  # of the view


class UniformArguments(NamedTuple):
    """What `keyed_uniform` takes."""

    ids: Tensor  # int64 [B]
    seed: Tensor  # int64 [], and the next two: where in Philox's numbers these lie
    offset: Tensor  # int64 []
    stream: Tensor  # int64 [B]
    length: int  # numbers of a sample


def keyed_uniform(args: UniformArguments) -> Tensor:
    """float32 [B, length] in [0, 1)."""
    shape = (len(args.ids), args.length)
    return philox_uniform(shape, args.seed, args.offset, sample_ids=args.ids, stream=args.stream[:, None])


def augment(args: AugmentArguments) -> Tensor:
    """The views [B, 3, S, S], in [0, 1], in channels-last memory."""
    view = unclamped(args)
    out = torch.empty(view.shape, dtype=args.out_dtype, device=view.device, memory_format=torch.channels_last)
    return out.copy_(view.clamp(0, 1))


def unclamped(args: AugmentArguments) -> Tensor:
    """The views in the precision of the computation, before rounding is kept from leaving [0, 1]."""
    x = unit_pixels(args.x)
    x = resized_crop(x, args.boxes, args.size, args.flip, grid=(args.grid_height, args.grid_width))
    if args.factors is not None and args.order is not None:
        x = color_jitter(x, args.factors, args.order)
    if args.gray is not None:
        x = torch.where(args.gray.view(-1, 1, 1, 1), grayscale(x), x)
    if args.sigma is not None:
        x = gaussian_blur(x, args.sigma, kernel=args.kernel or None)
    return x


def unit_pixels(x: Tensor) -> Tensor:
    """x as floats in [0, 1], of 32 bits at least: uint8 levels are divided by 255."""
    return x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.promote_types(x.dtype, torch.float32))


def _resampling(start: Tensor, length: Tensor, source: int, grid: int, size: int) -> Tensor:
    """Rows of weights [B, size, source]: antialiased bilinear from [start, start + length) to the middle of a grid."""
    first = round((grid - size) / 2)  # half to even, as torchvision crops
    scale = (length / grid)[:, None, None]
    support = scale.clamp(min=1.0)
    target = torch.arange(first, first + size, device=start.device)
    centre = start[:, None, None] + (target + 0.5)[None, :, None] * scale
    pixel = torch.arange(source, device=start.device)[None, None, :]
    weight = (1 - ((pixel + 0.5 - centre) / support).abs()).clamp(min=0)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True)


def _apply(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T per sample and channel: [B, S, H], [B, 3, H, W], [B, T, W] -> [B, 3, S, T]."""
    rows, columns = rows.to(x.dtype), columns.to(x.dtype)
    return torch.matmul(torch.matmul(rows[:, None], x), columns[:, None].transpose(2, 3))


def resized_crop(
    x: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None, *, grid: tuple[int, int] | None = None
) -> Tensor:
    """Crop boxes [B, 4], resize each to grid (size x size by default), take its middle; mirror where flip is set."""
    height, width = grid or (size, size)
    rows = _resampling(boxes[:, 0], boxes[:, 2], x.shape[2], height, size)
    columns = _resampling(boxes[:, 1], boxes[:, 3], x.shape[3], width, size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return _apply(rows, x, columns)


def _luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0] + g * LUMA[1] + b * LUMA[2])[:, None]


def grayscale(x: Tensor) -> Tensor:
    """The luma in all three channels."""
    return _luma(x).expand_as(x)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by turns [B] (1 is the whole circle), through HSV."""
    value, _ = x.max(1)
    spread = value - x.min(1).values
    safe = spread.clamp(min=1e-8)
    r, g, b = x.unbind(1)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = hue + 6 * turns.to(x.dtype).view(-1, 1, 1)

    def channel(turn: int) -> Tensor:
        k = hue + turn
        k = k - 6 * torch.floor(k / 6)
        return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def color_jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue by factors [B, 4] (the last in turns), in the order [B, 4]."""
    factors = factors.to(x.dtype)
    for place in range(4):
        which = order[:, place].view(-1, 1, 1, 1)
        gray = _luma(x)
        mean = gray.mean((2, 3), keepdim=True)
        other = torch.where(which == CONTRAST, mean, torch.where(which == SATURATION, gray, 0.0))
        kept = factors.gather(1, order[:, place : place + 1].clamp(max=SATURATION)).view(-1, 1, 1, 1)
        mixed = (other + kept * (x - other)).clamp(0, 1)
        turned = shift_hue(x, factors[:, HUE])
        x = torch.where(which == HUE, turned, torch.where(which == NOTHING, x, mixed))
    return x


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


def examples() -> dict[str, list[Any]]:
    """Calls that the contract tests make of each op on every backend."""
    u = philox_uniform((2, 3, 19, 14), 0)
    whole = AugmentArguments(
        x=u, boxes=torch.tensor([[2.0, 1, 15, 12], [0, 3, 9, 11]]), flip=torch.tensor([True, False]),
        factors=torch.tensor([[0.7, 1.3, 0.8, 0.1], [1.2, 0.9, 1.4, -0.07]]),
        order=torch.tensor([[0, 3, 1, 2], [1, 2, 0, 3]]), gray=torch.tensor([False, True]),
        sigma=torch.tensor([1.2, 0.0]), kernel=0, grid_height=11, grid_width=11, size=11, out_dtype=torch.float32,
    )  # fmt: skip
    levels = whole._replace(x=(u * 255).to(torch.uint8), flip=None, kernel=5, gray=None)
    crop = levels._replace(factors=None, order=None, sigma=None, kernel=0, grid_height=16, grid_width=12)
    middle = crop._replace(x=u.bfloat16())
    ids, streams = torch.tensor([5, 2**35 + 1, -3]), torch.tensor([2**31 + 5, 0, 7])
    draw = UniformArguments(ids, torch.tensor(2**40 + 3), torch.tensor(7), streams, length=35)
    return {"augment": [whole, levels, crop, middle], "keyed_uniform": [draw]}

"""Views of images in one pass: `augment`, and `keyed_uniform`, the random numbers that views are drawn by.

A view is a random resized crop, mirror, jitter of the colours, gray and blur, each sample by parameters of its own. The
kernels read uint8 levels as they are stored, visit the crop's rows and columns only, and wait for nothing. Gradients in
the pixels come from the reference, computed anew in the backward pass, whatever backend the forward had.
"""

from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.augment.reference import NOTHING, AugmentArguments, UniformArguments, unclamped
from poisonshield.ops.check import (
    FLOATS,
    check_device,
    check_number,
    check_out_dtype,
    check_tensor,
    check_without_gradient,
    kind,
    readable,
    word,
)
from poisonshield.ops.library import Op

__all__ = ["augment", "keyed_uniform"]

_TENSORS = 7  # how many fields of AugmentArguments, its first ones, are tensors


def augment(
    x: Tensor,
    boxes: Tensor,
    *,
    size: int,
    grid: tuple[int, int] | None = None,
    flip: Tensor | None = None,
    factors: Tensor | None = None,
    order: Tensor | None = None,
    gray: Tensor | None = None,
    sigma: Tensor | None = None,
    kernel: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Views [B, 3, size, size] in [0, 1], in channels-last memory: crop, mirror, colours, gray, blur, in this order.

    x [B, 3, H, W]: floats in [0, 1], or uint8 levels, in any memory order. boxes float [B, 4]: top, left, height and
    width of the crop, whole numbers within the image. It is resized by antialiased bilinear weights to size x size, or
    to grid (rows, columns), of which the middle size x size is the view. flip bool [B] mirrors.

    factors float [B, 4]: what brightness, contrast and saturation are multiplied by, and by which share of the colour
    circle the hue turns. order int64 [B, 4], given with them: which of the four, 0 to 3, comes first, second, third and
    last; 4 for none. Results are clamped to [0, 1] after each of the first three. gray bool [B] leaves the luma.
    sigma float [B], in pixels: the blur's standard deviation, 0 for none. kernel: an odd number of pixels to which the
    blur is cut, with a mirrored border; None for the whole Gaussian. out_dtype: by default float32, or the floats of x.

    Differentiable in x. Numbers on a GPU are not checked: of a box, what lies outside of the image is left out, and a
    pixel of which nothing is left is NaN. Raises TypeError, ShapeError, ConfigError, GradientError (a parameter
    requires gradients).
    """
    _check_pixels(x)
    check_number("size", size, least=1, whole=True)
    rows, columns = (size, size) if grid is None else grid
    for name, value in (("grid[0]", rows), ("grid[1]", columns)):
        check_number(name, value, least=size, whole=True)
    if kernel is not None:
        check_number("kernel", kernel, least=1, whole=True)
        if kernel % 2 == 0:
            raise ConfigError(f"kernel {kernel} has no middle pixel. Give an odd number, or None for a whole Gaussian.")
    check_out_dtype(out_dtype)
    if (factors is None) != (order is None):
        raise ConfigError("factors and order go together: give both or neither.")
    check_without_gradient(boxes=boxes, factors=factors, sigma=sigma)
    _check_parameter(x, boxes, "boxes", (4,), "floats")
    _check_boxes(x, boxes)
    _check_parameter(x, flip, "flip", (), "bools")
    _check_parameter(x, factors, "factors", (4,), "floats")
    _check_parameter(x, order, "order", (4,), "int64")
    _check_order(order)
    _check_parameter(x, gray, "gray", (), "bools")
    _check_parameter(x, sigma, "sigma", (), "floats")
    if sigma is not None and readable(sigma) and not bool((sigma >= 0).all()):
        raise ConfigError(f"sigma {sigma.tolist()} has a negative or NaN entry. Give pixels, 0 for no blur.")
    arguments = AugmentArguments(
        x=x,
        boxes=boxes,
        flip=flip,
        factors=factors,
        order=order,
        gray=gray,
        sigma=sigma,
        kernel=kernel or 0,
        grid_height=rows,
        grid_width=columns,
        size=size,
        out_dtype=out_dtype or (x.dtype if x.is_floating_point() else torch.float32),
    )
    views: Tensor = _augment(arguments, dispatch.requested(backend))
    return views


def keyed_uniform(
    ids: Tensor,
    count: int,
    *,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    stream: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor:
    """float32 [B, count] in [0, 1): what `philox_uniform` gives for the samples ids, int64 [B], in one kernel.

    To the bit, on every backend. seed, offset, stream: integers, or int64 tensors of one element on the device of ids;
    stream also int64 [B], so that several draws are one. Raises TypeError, ShapeError, ConfigError.
    """
    check_tensor("ids", ids, "int64 [B]")
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ShapeError(f"ids is {kind(ids)}. Give int64 [B], an id for each sample.")
    check_number("count", count, least=0, whole=True)
    if isinstance(stream, Tensor) and stream.shape == ids.shape and stream.dtype == torch.int64:
        check_device(ids, stream, "stream", owner="ids")
    else:
        stream = word(ids, stream, "stream").expand(len(ids))
    arguments = UniformArguments(
        ids=ids, seed=word(ids, seed, "seed"), offset=word(ids, offset, "offset"), stream=stream, length=count
    )
    numbers: Tensor = _keyed_uniform(arguments, dispatch.requested(backend))
    return numbers


def _check_pixels(x: Tensor) -> None:
    wanted = "pixels [B, 3, H, W], floats in [0, 1] or uint8 levels"
    check_tensor("x", x, wanted)
    if x.dtype not in (*FLOATS, torch.uint8):
        raise TypeError(f"x is {kind(x)}. Give {wanted}.")
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Give {wanted}.")


_KINDS = {
    "floats": (torch.float32, torch.float64),
    "bools": (torch.bool,),
    "int64": (torch.int64,),
}


def _check_parameter(x: Tensor, value: Tensor | None, name: str, shape: tuple[int, ...], numbers: str) -> None:
    """Raises for what is not one such number, or a row of them, for each sample."""
    if value is None:
        return
    wanted = f"{numbers} {[x.shape[0], *shape]}"
    check_tensor(name, value, wanted)
    if value.dtype not in _KINDS[numbers] or value.shape != (x.shape[0], *shape):
        raise ShapeError(f"{name} is {kind(value)}. Give {wanted}.")
    check_device(x, value, name, owner="x")


def _check_boxes(x: Tensor, boxes: Tensor) -> None:
    if not readable(boxes) or not boxes.numel():
        return
    begin, length = boxes[:, :2], boxes[:, 2:]
    low, end = begin.amin(0).tolist(), (begin + length).amax(0).tolist()
    if not (min(low) >= 0 and end[0] <= x.shape[2] and end[1] <= x.shape[3] and float(length.min()) >= 1):
        raise ConfigError(
            f"boxes begin at {low} and end at {end} (rows, columns), and the smallest side is {float(length.min()):g}: "
            f"images have {x.shape[2]} x {x.shape[3]} pixels. Give [top, left, height, width] within them."
        )


def _check_order(order: Tensor | None) -> None:
    if order is None or not readable(order) or not order.numel():
        return
    least, most = (int(v) for v in order.aminmax())
    if least < 0 or most > NOTHING:
        raise ConfigError(f"order reaches from {least} to {most}. Give 0 to 3 for the changes and {NOTHING} for none.")


def _fake(args: AugmentArguments) -> Tensor:
    shape = (args.x.shape[0], 3, args.size, args.size)
    return torch.empty(shape, dtype=args.out_dtype, device=args.x.device, memory_format=torch.channels_last)


def _save(ctx: Any, args: AugmentArguments, output: Tensor) -> None:
    ctx.save_for_backward(*args[:_TENSORS])
    ctx.settings = args[_TENSORS:]


def _gradients(ctx: Any, wanted: Any, grad: Tensor) -> dict[str, Tensor | None]:
    """By autograd through the reference; rounding at the ends of [0, 1] stops none."""
    x, *others = ctx.saved_tensors
    again = torch.is_grad_enabled()  # a second derivative is asked for
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaf = x.view_as(x) if again else x.detach().requires_grad_()
        view = unclamped(AugmentArguments(leaf, *others, *ctx.settings))
        (found,) = torch.autograd.grad(view, leaf, grad.to(view.dtype), create_graph=again)
    return {"x": found}


def _uniform_fake(args: UniformArguments) -> Tensor:
    return args.ids.new_empty((args.ids.shape[0], args.length), dtype=torch.float32)


_room = dispatch.Room("augment")
_augment = Op("augment", _room, AugmentArguments, returns="Tensor", fake=_fake, save=_save, gradients=_gradients)
_keyed_uniform = Op("keyed_uniform", _room, UniformArguments, returns="Tensor", fake=_uniform_fake)

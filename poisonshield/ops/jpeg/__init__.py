"""Differentiable JPEG, batched, with a quality per sample: `jpeg(x, 75)`.

mode="smooth" is a float pipeline with real derivatives; mode="exact" equals libjpeg-turbo to the bit and borrows the
smooth backward. Saved for the backward: x and the tables, nothing else.
"""

from numbers import Real

import torch
from torch import Tensor

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.jpeg.tables import jpeg_tables, scaled_tables
from poisonshield.ops.library import register

__all__ = ["jpeg", "jpeg_coefficients", "jpeg_tables"]

SUBSAMPLINGS = ("420", "444")
MODES = ("smooth", "exact")
ROUNDINGS = ("poly", "ste", "hard", "poly_ste", "fourier", "none")
UPSAMPLINGS = ("fancy", "box")


def jpeg(
    x: Tensor,
    quality: Tensor | float | int,
    *,
    subsampling: str = "420",
    mode: str = "smooth",
    rounding: str = "poly",
    fourier_terms: int = 10,
    upsample: str = "fancy",
    integer_planes: bool = False,
    qtables: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    mean: Tensor | None = None,
    std: Tensor | None = None,
    clamp_grad: float = 0.0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """x after JPEG compression and decompression: same shape, memory layout and (unless out_dtype) dtype.

    x [B, 3, H, W], any H and W >= 1, in value_range, or normalised by mean and std [3]; float16, bfloat16, float32 or
    float64 (computed in at least float32, rounded once), uint8 only in exact mode (value_range is then 0..255).
    quality: number or [B], 1..100, 0 counts as 1; whole numbers in exact mode. May require gradients (floors pass them
    through), and so may qtables [2, 8, 8] or [B, 2, 8, 8], which replace the standard's base tables.

    rounding, of coefficients u with nearest integer n and rest e = u - n (forward; slope):
    "poly" n + e^3; 3 e^2. "ste" n; 1. "poly_ste" n; 3 e^2. "hard" n; none. "fourier" u minus `fourier_terms` terms of
    the sawtooth's series; its derivative. "none" u; 1. Exact mode rounds as libjpeg; the slope is the one named.
    upsample: "fancy" (triangle filter, libjpeg's default) or "box", smooth mode and 4:2:0 only.
    integer_planes: smooth mode rounds every stored plane, passing gradients straight through.
    clamp_grad: slope where a clamp cuts, 0 (none) to 1 (pass through).

    Smooth mode spreads a NaN over its 16x16 neighbourhood and no further; exact mode reads it as 0. Quality on a CUDA
    device is not checked but clamped, so that nothing waits for the device. Raises TypeError, ValueError (ShapeError
    for shapes) and GradientError. Not for: codecs other than libjpeg-turbo's default path (see exact.py).
    """
    _check_x(x, mode)
    _check_names(subsampling, mode, rounding, upsample)
    if mode == "exact" and upsample == "box":
        raise ValueError("mode='exact' decodes as libjpeg does, with upsample='fancy'; 'box' needs mode='smooth'.")
    if mode == "exact" and integer_planes:
        raise ValueError("integer_planes is for mode='smooth'; exact mode stores integers already.")
    if not 0 <= clamp_grad <= 1:
        raise ValueError(f"clamp_grad {clamp_grad} is outside 0..1.")
    if fourier_terms < 1:
        raise ValueError(f"fourier_terms {fourier_terms}: give at least 1.")
    tables = _tables(x, quality, qtables, whole=mode == "exact")
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or tables.requires_grad)
    if rounding == "hard" and needs_grad:
        raise GradientError(
            "rounding='hard' has no gradient. Use 'ste', 'poly' or 'poly_ste', or call under torch.no_grad()."
        )
    dtype = x.dtype if out_dtype is None else out_dtype
    return _jpeg(
        x, tables, _affine(x, value_range, mean, std), subsampling, mode, rounding, fourier_terms, upsample,
        integer_planes, float(clamp_grad), dtype, dispatch.requested(backend),
    )  # fmt: skip


def jpeg_coefficients(
    x: Tensor,
    quality: Tensor | float | int,
    *,
    subsampling: str = "420",
    mode: str = "exact",
    qtables: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantised coefficients of Y, Cb and Cr, each int32 [B, rows of blocks, columns of blocks, 8, 8].

    mode="exact" gives those that libjpeg-turbo writes into the file (which may crop blocks that are padding alone);
    "smooth" those of the float transform. Arguments as in `jpeg`. Not differentiable.
    """
    from poisonshield.ops.jpeg import exact, reference

    _check_x(x, mode)
    _check_names(subsampling, mode, "hard", "fancy")
    tables, affine = _tables(x, quality, qtables, whole=mode == "exact"), _affine(x, value_range, mean, std)
    with torch.no_grad():
        if mode == "exact":
            planes = exact.exact_coefficients(reference.to_pixels(x, affine), tables, subsampling)
        else:
            pipeline = reference.Pipeline(x, tables, affine, subsampling, "hard", 1, "fancy", False)
            planes = tuple(reference.nearest(u).to(torch.int32) for u in pipeline.u)
    y, cb, cr = planes[0][:, 0], planes[1][:, 0], planes[1][:, 1]
    return tuple(p.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2) for p in (y, cb, cr))


def _check_x(x: Tensor, mode: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}. Give a tensor [B, 3, H, W].")
    if not x.is_floating_point() and not (x.dtype == torch.uint8 and mode == "exact"):
        raise TypeError(f"x is {x.dtype}. Give float pixels in [0, 1]; uint8 is for mode='exact'.")
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[1:]:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Give RGB pixels [B, 3, H, W] with H and W at least 1.")


def _check_names(subsampling: str, mode: str, rounding: str, upsample: str) -> None:
    for name, value, known in (
        ("subsampling", subsampling, SUBSAMPLINGS),
        ("mode", mode, MODES),
        ("rounding", rounding, ROUNDINGS),
        ("upsample", upsample, UPSAMPLINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown. Known: {', '.join(known)}")


def _tables(x: Tensor, quality: Tensor | float | int, qtables: Tensor | None, *, whole: bool) -> Tensor:
    """The scaled tables of each sample, [B, 2, 8, 8] on the device of x."""
    if isinstance(quality, Real) and not isinstance(quality, bool):
        _checked(quality, whole)
        quality = torch.full((1,), quality, dtype=torch.float32, device=x.device)
    elif not isinstance(quality, Tensor):
        raise TypeError(f"quality is a {type(quality).__name__}. Give a number or a tensor [B].")
    if quality.is_complex() or quality.dtype == torch.bool:
        raise TypeError(f"quality is {quality.dtype}. Give numbers from 1 to 100.")
    if quality.dim() > 1 or (quality.dim() == 1 and len(quality) not in (1, len(x))):
        raise ShapeError(f"quality has shape {tuple(quality.shape)} for {len(x)} images. Give one number, or one each.")
    if quality.device.type == "cpu":
        if not torch.compiler.is_compiling():
            for q in quality.detach().reshape(-1).tolist():
                _checked(q, whole)
    elif quality.device != x.device:
        raise ValueError(f"quality is on {quality.device} and x on {x.device}. Move one of them.")
    if qtables is not None:
        if qtables.device != x.device:
            raise ValueError(f"qtables are on {qtables.device} and x on {x.device}. Move one of them.")
        if qtables.dim() == 4 and len(qtables) not in (1, len(x)):
            raise ShapeError(f"qtables are for {len(qtables)} images and x has {len(x)}.")
        if qtables.device.type == "cpu" and not torch.compiler.is_compiling() and qtables.numel():
            if not (qtables.min() >= 1 and qtables.max() <= 65535):
                raise ValueError("qtables must lie in 1..65535 (before scaling by quality).")
    quality = quality.to(x.device)
    if whole:
        quality = quality.floor() if quality.is_floating_point() else quality
    tables = scaled_tables(quality if quality.is_floating_point() else quality.float(), qtables)
    return tables.expand(len(x), 2, 8, 8)


def _checked(quality: float, whole: bool) -> None:
    if not 0 <= quality <= 100:
        raise ValueError(f"quality {quality} is outside 1..100 (0 counts as 1).")
    if whole and quality != int(quality):
        raise ValueError(f"quality {quality} is not whole. libjpeg knows whole qualities only; use mode='smooth'.")


def _affine(x: Tensor, value_range: tuple[float, float], mean: Tensor | None, std: Tensor | None) -> Tensor:
    """[2, 3]: pixel in 0..255 = x * affine[0] + affine[1], per channel."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither.")
    low, high = value_range
    if not high > low:
        raise ValueError(f"value_range {value_range} is empty. Give (low, high) with low < high.")
    if x.dtype == torch.uint8:
        if mean is not None or tuple(value_range) != (0.0, 1.0):
            raise ValueError("uint8 pixels are 0..255 already: leave value_range, mean and std alone.")
        return torch.stack((x.new_ones(3, dtype=torch.float32), x.new_zeros(3, dtype=torch.float32)))
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean is None or std is None:
        scale = torch.full((3,), 255 / (high - low), dtype=dtype, device=x.device)
        return torch.stack((scale, scale * -low))
    for name, value in (("mean", mean), ("std", std)):
        if not isinstance(value, Tensor) or value.numel() != 3:
            raise ShapeError(f"{name} must be a tensor of 3 numbers, one per channel.")
    mean, std = (v.reshape(3).to(x.device, dtype) for v in (mean, std))
    if std.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((std > 0).all()):
        raise ValueError(f"std {std.tolist()} must be positive.")
    return torch.stack((std, mean - low)) * (255 / (high - low))


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    x, tables, affine, subsampling, _, rounding, terms, upsample, integer_planes, clamp_grad, _, backend = inputs
    ctx.save_for_backward(x, tables, affine)
    ctx.settings = subsampling, rounding, terms, upsample, integer_planes, clamp_grad
    ctx.backend = backend


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    x, tables, affine = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    dx, dtables = _jpeg_backward(grad, x, tables, affine, *ctx.settings, wanted, ctx.backend)
    return dx, dtables if wanted else None, *[None] * 10


_room = dispatch.Room("jpeg")
_jpeg_backward = register(
    "jpeg_backward(Tensor grad, Tensor x, Tensor tables, Tensor affine, str subsampling, str rounding, "
    "int fourier_terms, str upsample, bool integer_planes, float clamp_grad, bool table_grad, str backend) "
    "-> (Tensor, Tensor)",
    _room,
    fake=lambda grad, x, tables, *settings: (
        torch.empty_like(x),
        torch.empty_like(tables) if settings[-2] else tables.new_empty(0),
    ),
)
_jpeg = register(
    "jpeg(Tensor x, Tensor tables, Tensor affine, str subsampling, str mode, str rounding, int fourier_terms, "
    "str upsample, bool integer_planes, float clamp_grad, ScalarType out_dtype, str backend) -> Tensor",
    _room,
    fake=lambda x, *settings: torch.empty_like(x, dtype=settings[-2]),
    setup_context=_setup,
    backward=_backward,
)

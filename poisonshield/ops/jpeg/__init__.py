"""Differentiable JPEG, batched, with a quality per sample: `jpeg(x, 75)`, or `JPEG(75)` as a module.

mode="smooth" is a float pipeline with real derivatives; mode="exact" equals libjpeg-turbo to the bit and borrows the
smooth backward. Saved for the backward: x and the tables, nothing else.
"""

from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.jpeg import exact, reference
from poisonshield.ops.jpeg.inputs import affine_of, check_names, check_pixels, tables_of
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings
from poisonshield.ops.jpeg.tables import jpeg_tables
from poisonshield.ops.library import Op

__all__ = ["JPEG", "jpeg", "jpeg_coefficients", "jpeg_tables"]


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

    x [B, 3, H, W], any H and W >= 1, in value_range, or normalized by mean and std [3]; float16, bfloat16, float32 or
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
    check_pixels(x, mode)
    check_names(subsampling, mode, rounding, upsample)
    if mode == "exact" and upsample == "box":
        raise ValueError("mode='exact' decodes as libjpeg does, with upsample='fancy'; 'box' needs mode='smooth'.")
    if mode == "exact" and integer_planes:
        raise ValueError("integer_planes is for mode='smooth'; exact mode stores integers already.")
    if not 0 <= clamp_grad <= 1:
        raise ValueError(f"clamp_grad {clamp_grad} is outside 0..1.")
    if fourier_terms < 1:
        raise ValueError(f"fourier_terms {fourier_terms}: give at least 1.")
    tables = tables_of(x, quality, qtables, whole=mode == "exact")
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or tables.requires_grad)
    if rounding == "hard" and needs_grad:
        raise GradientError(
            "rounding='hard' has no gradient. Use 'ste', 'poly' or 'poly_ste', or call under torch.no_grad()."
        )
    arguments = JpegArguments(
        x=x,
        tables=tables,
        affine=affine_of(x, value_range, mean, std),
        mode=mode,
        settings=JpegSettings(
            subsampling=subsampling,
            rounding=rounding,
            fourier_terms=fourier_terms,
            upsample=upsample,
            integer_planes=integer_planes,
            clamp_grad=float(clamp_grad),
        ),
        out_dtype=x.dtype if out_dtype is None else out_dtype,
    )
    return _jpeg(arguments, dispatch.requested(backend))


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
    check_pixels(x, mode)
    check_names(subsampling, mode, "hard", "fancy")
    tables, affine = tables_of(x, quality, qtables, whole=mode == "exact"), affine_of(x, value_range, mean, std)
    with torch.no_grad():
        if mode == "exact":
            luma, chroma = exact.exact_coefficients(reference.to_pixels(x, affine), tables, subsampling)
        else:
            pipeline = reference.Pipeline(x, tables, affine, JpegSettings(subsampling, rounding="hard"))
            luma, chroma = (reference.nearest(u).to(torch.int32) for u in pipeline.u)
    y, cb, cr = luma[:, 0], chroma[:, 0], chroma[:, 1]  # each [B, 8 rows, 8 columns]
    return tuple(p.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2) for p in (y, cb, cr))


class JPEG(nn.Module):
    """Compresses [B, 3, H, W] or [3, H, W] at `quality`, a number or a range (low, high) drawn from per sample.

    p: probability that a sample is compressed at all. generator: where draws come from (its device must be x's; torch's
    own if None). Ranges draw whole numbers, both ends included. Other settings as in `jpeg`; draws happen in eval mode
    too: leave the module out where none are wanted.
    """

    def __init__(
        self,
        quality: float | tuple[int, int] = 75,
        *,
        p: float = 1.0,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        low, high = quality if isinstance(quality, tuple) else (quality, quality)
        if not 0 <= low <= high <= 100:
            raise ValueError(f"quality {quality} is not within 1..100, low before high.")
        if not 0 <= p <= 1:
            raise ValueError(f"p {p} is not a probability.")
        self.quality, self.p, self.generator, self.settings = quality, p, generator, settings

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, layout and dtype as x."""
        if x.dim() == 3:
            return self(x[None])[0]
        if x.dim() != 4:
            raise ShapeError(f"x has shape {tuple(x.shape)}. Give [B, 3, H, W] or [3, H, W].")
        out = jpeg(x, self._quality(x), **self.settings)
        if self.p == 1:
            return out
        chosen = torch.rand(len(x), generator=self.generator, device=x.device) < self.p
        return torch.where(chosen[:, None, None, None], out, x.to(out.dtype))

    def _quality(self, x: Tensor) -> Tensor | float:
        """The fixed one, or one for each of x [B, ...], drawn: int64 [B]."""
        if not isinstance(self.quality, tuple):
            return self.quality
        low, high = self.quality
        return torch.randint(low, high + 1, (len(x),), generator=self.generator, device=x.device)

    def extra_repr(self) -> str:
        """Quality, p and the settings, as they were given."""
        settings = "".join(f", {k}={v!r}" for k, v in self.settings.items())
        return f"{self.quality}, p={self.p}{settings}"


def _fake(args: JpegArguments) -> Tensor:
    return torch.empty_like(args.x, dtype=args.out_dtype)


def _save(ctx: Any, args: JpegArguments, output: Tensor) -> None:
    ctx.save_for_backward(args.x, args.tables, args.affine)
    ctx.settings = args.settings


def _gradients(ctx: Any, wanted: Any, grad: Tensor) -> dict[str, Tensor | None]:
    x, tables, affine = ctx.saved_tensors
    arguments = JpegGradientArguments(grad, x, tables, affine, ctx.settings, table_grad=wanted.tables)
    dx, dtables = _jpeg_backward(arguments, ctx.backend)
    return {"x": dx, "tables": dtables if wanted.tables else None}


def _gradient_fake(args: JpegGradientArguments) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args.x), torch.empty_like(args.tables) if args.table_grad else args.tables.new_empty(0)


_room = dispatch.Room("jpeg")
_jpeg_backward = Op("jpeg_backward", _room, JpegGradientArguments, returns="(Tensor, Tensor)", fake=_gradient_fake)
_jpeg = Op("jpeg", _room, JpegArguments, returns="Tensor", fake=_fake, save=_save, gradients=_gradients)

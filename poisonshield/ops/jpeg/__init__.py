"""Differentiable JPEG, batched, with a quality per sample: `jpeg(x, 75)`, or `JPEG(75)` as a module.

mode="smooth" is a float pipeline with real derivatives; mode="exact" equals libjpeg-turbo to the bit and borrows the
smooth backward. Saved for the backward: x and the tables, nothing else.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import ConfigError, GradientError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.check import check_number, check_out_dtype, check_reach, is_number
from poisonshield.ops.jpeg import exact, reference
from poisonshield.ops.jpeg.inputs import (
    affine_of,
    check_pixels,
    check_quality,
    check_settings,
    check_space,
    tables_of,
)
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings
from poisonshield.ops.jpeg.sample import change_images
from poisonshield.ops.jpeg.tables import jpeg_tables
from poisonshield.ops.library import Op

_WAY_OUT = " (mean and std, or value_range); check=False leaves this check out, and far values are clamped"

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
    check: bool = True,
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
    check: whether pixels on the CPU that lie far outside value_range are refused, as 8-bit levels and normalized pixels
    do; a little outside they are clamped. Costs one pass over x, a hundredth of the whole.

    The gradient of quality, and of qtables, is that of the rounding's slope. Learn a quality with "ste" or "fourier",
    whose gradient has the sign of the trend; that of "poly" and "poly_ste" mostly has the opposite one, since e^3 is
    nearly flat where most coefficients lie, and "none" has none, as nothing is lost.

    Smooth mode spreads a NaN over its 16x16 neighbourhood and no further; exact mode reads it as 0. Quality on a CUDA
    device is not checked but clamped, so that nothing waits for the device. Raises TypeError, ValueError (ConfigError
    for settings, ShapeError for shapes and pixels) and GradientError. Not for: codecs other than libjpeg-turbo's
    default path (see exact.py).
    """
    settings = JpegSettings(
        subsampling=subsampling,
        rounding=rounding,
        fourier_terms=fourier_terms,
        upsample=upsample,
        integer_planes=integer_planes,
        clamp_grad=clamp_grad,
    )
    check_settings(settings, mode)
    check_pixels(x, mode)
    if not (out_dtype == x.dtype == torch.uint8):
        check_out_dtype(out_dtype)
    tables = tables_of(x, quality, qtables, whole=mode == "exact")
    affine = affine_of(x, value_range, mean, std)
    if check and mean is None:
        check_reach(x, value_range, way_out=_WAY_OUT)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or tables.requires_grad)
    if rounding == "hard" and needs_grad:
        raise GradientError(
            "rounding='hard' has no gradient. Use 'ste', 'poly' or 'poly_ste', or call under torch.no_grad()."
        )
    arguments = JpegArguments(
        x=x,
        tables=tables,
        affine=affine,
        mode=mode,
        settings=settings._replace(clamp_grad=float(clamp_grad)),
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
    check: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantised coefficients of Y, Cb and Cr, each int32 [B, rows of blocks, columns of blocks, 8, 8].

    mode="exact" gives those that libjpeg-turbo writes into the file (which may crop blocks that are padding alone);
    "smooth" those of the float transform. Arguments as in `jpeg`. Not differentiable.
    """
    settings = JpegSettings(subsampling, rounding="hard")
    check_settings(settings, mode)
    check_pixels(x, mode)
    tables, affine = tables_of(x, quality, qtables, whole=mode == "exact"), affine_of(x, value_range, mean, std)
    if check and mean is None:
        check_reach(x, value_range, way_out=_WAY_OUT)
    with torch.no_grad():
        if mode == "exact":
            luma, chroma = exact.exact_coefficients(reference.to_pixels(x, affine), tables, subsampling)
        else:
            pipeline = reference.Pipeline(x, tables, affine, settings)
            luma, chroma = (reference.nearest(u).to(torch.int32) for u in pipeline.u)
    y, cb, cr = luma[:, 0], chroma[:, 0], chroma[:, 1]  # each [B, 8 rows, 8 columns]
    return tuple(p.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2) for p in (y, cb, cr))


class JPEG(nn.Module):
    """Compresses images at `quality`, a number or a range (low, high) drawn from for each of them.

    Takes [..., 3, H, W] with any leading dimensions, and what a torchvision v2 transform takes: a Pillow picture (RGB
    or L), a tv_tensors.Image or Video, and samples that hold such, as (image, label), more arguments, lists or
    dictionaries. As there, a sample's images are its pictures and tv_tensors, else its first tensor; the rest stays.
    8-bit images stay 8-bit: smooth mode reads them as levels / 255 and rounds what comes out.

    p: probability that an image is compressed at all. generator: where draws come from (its device must be x's; torch's
    own if None). Ranges draw whole numbers, both ends included. Other settings as in `jpeg`, and checked here where
    they are plain values. Draws happen in eval mode too: leave the module out where none are wanted.
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
        _check_module(quality, p, settings)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator is a {type(generator).__name__}. Give a torch.Generator, or None for torch's own."
            )
        self.quality, self.p, self.generator, self.settings = quality, p, generator, settings

    def forward(self, *inputs: Any) -> Any:
        """What was given, with images compressed: same structure, shapes, layouts and dtypes; a tuple for several."""
        if len(inputs) == 1:
            (sample,) = inputs
            return self._compress(sample) if type(sample) is Tensor else change_images(sample, self._compress)
        return change_images(inputs, self._compress)

    def _compress(self, x: Tensor) -> Tensor:
        """x [..., 3, H, W]."""
        if x.dim() < 3:
            raise ShapeError(f"x has shape {tuple(x.shape)}. Give [..., 3, H, W], RGB images.")
        if x.dim() == 4:
            return self._compress_batch(x)
        batch = x[None] if x.dim() == 3 else x.flatten(0, -4)
        return self._compress_batch(batch).reshape(x.shape)

    def _compress_batch(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W]."""
        if x.dtype == torch.uint8 and self.settings.get("mode", "smooth") == "smooth":
            given = sorted(_OF_FLOATS.intersection(self.settings))
            if given:
                raise ConfigError(f"8-bit images are 0..255 already: leave {', '.join(given)} alone.")
            return self._drawn(x / 255).clamp(0, 1).mul(255).round().to(torch.uint8)
        return self._drawn(x)

    def _drawn(self, x: Tensor) -> Tensor:
        out = jpeg(x, self._quality(x), **self.settings)
        if self.p == 1:
            return out
        chosen = torch.rand(x.shape[:1], **self._source(x)) < self.p
        return torch.where(chosen[:, None, None, None], out, x.to(out.dtype))

    def _quality(self, x: Tensor) -> Tensor | float:
        """The fixed one, or one for each of x [B, ...], drawn: int64 [B]."""
        if not isinstance(self.quality, tuple):
            return self.quality
        low, high = self.quality
        return torch.randint(low, high + 1, x.shape[:1], **self._source(x))

    def _source(self, x: Tensor) -> dict[str, Any]:
        """Where random numbers for x come from. torch does not trace a generator, not even None, with a traced size."""
        if self.generator is None:
            return {"device": x.device}
        if self.generator.device != x.device:
            raise ConfigError(f"the generator is on {self.generator.device} and x on {x.device}. Move one of them.")
        return {"device": x.device, "generator": self.generator}

    def extra_repr(self) -> str:
        """Quality, p and the settings, as they were given."""
        settings = "".join(f", {k}={v!r}" for k, v in self.settings.items())
        return f"{self.quality}, p={self.p}{settings}"


_OF_FLOATS = frozenset(("value_range", "mean", "std", "out_dtype"))
"""Settings that say what floats mean."""


def _check_module(quality: Any, p: Any, settings: dict[str, Any]) -> None:
    """Raises TypeError or ConfigError for what `jpeg` would refuse in every call."""
    known = inspect.signature(jpeg).parameters
    unknown = [name for name in settings if name not in known or name in ("x", "quality")]
    if unknown:
        names = ", ".join(name for name in known if name not in ("x", "quality"))
        raise TypeError(f"{', '.join(unknown)}: no setting of JPEG. Known: p, generator, {names}")
    given = {name: settings[name] for name in JpegSettings._fields if name in settings}
    mode = settings.get("mode", "smooth")
    check_settings(JpegSettings(**given), mode)
    check_space(settings.get("value_range", (0.0, 1.0)))
    ends: tuple[Any, ...] = quality if isinstance(quality, tuple) else (quality, quality)
    if len(ends) != 2 or not all(is_number(q) for q in ends):
        raise TypeError(f"quality is {quality!r}. Give a number, or a range as two whole numbers (low, high).")
    if not 0 <= ends[0] <= ends[1] <= 100:
        raise ConfigError(f"quality {quality} is not within 1..100, low before high.")
    for end in ends:
        check_quality(end, whole=mode == "exact")
        if isinstance(quality, tuple):
            check_number("an end of a range of qualities", end, whole=True)
    if not is_number(p) or not 0 <= p <= 1:
        raise ConfigError(f"p {p} is not a probability.")


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

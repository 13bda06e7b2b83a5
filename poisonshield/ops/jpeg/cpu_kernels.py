"""The compiled JPEG of csrc/cpu/jpeg.cpp, called as the reference is: forward and backward, smooth and exact.

Tensors of any strides are read and written where they lie; half precision goes through a float32 copy. Exact mode
equals the reference to the bit. Smooth mode agrees to float32's accuracy, in the same bits whatever the number of
threads and the processor's level; a coefficient next to a tie may round the other way.
"""

import ctypes

import torch
from torch import Tensor

from poisonshield.ops import native
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings

_ROUNDINGS = {"none": 0, "poly": 1, "ste": 2, "hard": 2, "poly_ste": 3}


class _Pixels(ctypes.Structure):
    """A tensor [B, 3, H, W]."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class _Call(ctypes.Structure):
    """JpegCall of csrc/cpu/jpeg.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("x", _Pixels),
        ("out", _Pixels),
        ("grad", _Pixels),
        ("tables", ctypes.c_void_p),
        ("affine", ctypes.c_void_p),
        ("table_sums", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("bytes", ctypes.c_int32),
        ("half", ctypes.c_int32),
        ("smooth", ctypes.c_int32),
        ("exact", ctypes.c_int32),
        ("integer", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("clamp_grad", ctypes.c_float),
    ]


def refusal(function: str, args: JpegArguments | JpegGradientArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if args.x.dtype == torch.float64:
        return "float64 is for the reference"
    exact = isinstance(args, JpegArguments) and args.mode == "exact"
    if not exact and args.settings.rounding == "fourier":
        return "rounding='fourier' is for the reference"
    return None


def jpeg(args: JpegArguments) -> Tensor:
    """As the reference: exact mode to the bit, smooth mode to float32's accuracy."""
    out = torch.empty_like(args.x, dtype=args.out_dtype)
    if not out.numel():
        return out
    x = _readable(args.x)
    target = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    _run("jpeg", x, target, args.tables, args.affine, args.settings, exact=args.mode == "exact")
    return out if target is out else out.copy_(target)


def jpeg_backward(args: JpegGradientArguments) -> tuple[Tensor, Tensor]:
    """As the reference."""
    dx = torch.empty_like(args.x)
    by_band = None
    if args.table_grad:
        bands = -(-args.x.shape[2] // (16 if args.settings.subsampling == "420" else 8))
        by_band = torch.empty((len(args.x), bands, 2, 8, 8), dtype=torch.float32)
    if dx.numel():
        x = _readable(args.x)
        target = dx if dx.dtype == x.dtype else torch.empty_like(dx, dtype=x.dtype)
        _run("jpeg_backward", x, target, args.tables, args.affine, args.settings, args.grad.float(), by_band)
        if target is not dx:
            dx.copy_(target)
    dtables = args.tables.new_empty(0) if by_band is None else by_band.double().sum(1).to(args.tables.dtype)
    return dx, dtables


def _readable(x: Tensor) -> Tensor:
    """uint8 or float32."""
    return x if x.dtype == torch.uint8 else x.float()


def _run(
    function: str,
    x: Tensor,
    out: Tensor,
    tables: Tensor,
    affine: Tensor,
    settings: JpegSettings,
    grad: Tensor | None = None,
    by_band: Tensor | None = None,
    exact: bool = False,
) -> None:
    """Fill `out`, of the dtype of x, and by_band [B, bands, 2, 8, 8] if it is given."""
    tables, affine = tables.float().contiguous(), affine.float().contiguous()
    batch, _, height, width = x.shape
    half = settings.subsampling == "420"
    smooth = settings.upsample == "fancy" and (width + 1) // 2 > 2  # up to two columns are copied, as in libjpeg
    record = _Call(
        size=ctypes.sizeof(_Call),
        x=_pixels(x),
        out=_pixels(out),
        grad=_Pixels() if grad is None else _pixels(grad),
        tables=native.pointer(tables),
        affine=native.pointer(affine),
        table_sums=native.pointer(by_band),
        batch=batch,
        height=height,
        width=width,
        threads=native.threads(),
        bytes=x.dtype == torch.uint8,
        half=half,
        smooth=half and smooth,
        exact=exact,
        integer=settings.integer_planes,
        rounding=_ROUNDINGS.get(settings.rounding, 0),  # exact mode has its own
        clamp_grad=settings.clamp_grad,
    )
    native.call(function, record)


def _pixels(x: Tensor) -> _Pixels:
    return _Pixels(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))

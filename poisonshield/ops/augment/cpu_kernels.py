"""The compiled kernels of csrc/cpu/augment.cpp, called as the reference is.

Views agree with the reference to 2e-6, random numbers to the bit. A view's bits depend on neither the threads, the
processor's level, its batch nor the memory order of the pixels. uint8 and float32 pixels are read where they lie in
rows of a plane or of pixels; other ones are copied first. Each thread takes whole views.
"""

import ctypes

import torch
from torch import Tensor

from poisonshield.ops import native
from poisonshield.ops.augment.reference import AugmentArguments, UniformArguments


class _Call(ctypes.Structure):
    """AugmentCall of csrc/cpu/augment.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("out", "boxes", "flip", "factors", "order", "gray", "sigma")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "grid_height", "grid_width", "side")),
        *((name, ctypes.c_int64) for name in ("kernel", "threads")),
        *((name, ctypes.c_int32) for name in ("bytes", "pixels")),
    ]


class _UniformCall(ctypes.Structure):
    """UniformCall of csrc/cpu/augment.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "ids", "streams")),
        *((name, ctypes.c_int64) for name in ("seed", "offset", "batch", "count")),
    ]


def refusal(function: str, args: AugmentArguments | UniformArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if isinstance(args, AugmentArguments) and torch.float64 in (args.x.dtype, args.out_dtype):
        return "float64 is computed by the reference alone"
    return None


def augment(args: AugmentArguments) -> Tensor:
    """As the reference, to 2e-6."""
    x, pixels = _rows(args.x)
    batch, _, height, width = x.shape
    out = torch.empty((batch, 3, args.size, args.size), dtype=torch.float32, memory_format=torch.channels_last)
    floats = {name: _floats(getattr(args, name)) for name in ("boxes", "factors", "sigma")}
    others = {"flip": args.flip, "order": args.order, "gray": args.gray}
    alike = floats | {name: None if v is None else v.contiguous() for name, v in others.items()}
    record = _Call(
        size=ctypes.sizeof(_Call),
        x=native.pointer(x),
        strides=(ctypes.c_int64 * 4)(*x.stride()),
        out=native.pointer(out),
        **{name: native.pointer(v) for name, v in alike.items()},
        batch=batch,
        height=height,
        width=width,
        grid_height=args.grid_height,
        grid_width=args.grid_width,
        side=args.size,
        kernel=args.kernel,
        threads=native.threads(),
        bytes=x.dtype == torch.uint8,
        pixels=pixels,
    )
    native.call("augment", record)
    return out.to(args.out_dtype)


def keyed_uniform(args: UniformArguments) -> Tensor:
    """As the reference, to the bit."""
    ids, streams = args.ids.contiguous(), args.stream.contiguous()
    out = torch.empty((len(ids), args.length), dtype=torch.float32)
    record = _UniformCall(
        size=ctypes.sizeof(_UniformCall), out=native.pointer(out), ids=native.pointer(ids),
        streams=native.pointer(streams), seed=int(args.seed), offset=int(args.offset), batch=len(ids),
        count=args.length,
    )  # fmt: skip
    native.call("uniform", record)
    return out


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """x as uint8 or float32 whose rows lie together, and whether they are rows of pixels, not of a plane's numbers."""
    if x.dtype != torch.uint8:
        x = x.to(torch.float32)
    if x.stride(3) == 1 or x.shape[3] == 1:
        return x, False
    if x.stride(3) == 3 and x.stride(1) == 1:
        return x, True
    return x.contiguous(), False


def _floats(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()

"""The compiled PGD kernels of csrc/cpu/pgd.cpp, called as the reference is.

linf, step and start, equals the reference to the bit; l2 and sign_l2 agree to float32's rounding. Results have the same
bits whatever the number of threads and the processor's level. A step changes tensors of any dense order of dimensions
where they lie, others in a copy; a start takes numbers in row-major order, and a copy for any other one.
"""

import ctypes

import torch
from torch import Tensor

from poisonshield.ops import native
from poisonshield.ops.pgd.layout import Layout
from poisonshield.ops.pgd.reference import StartArguments, StepArguments, place_of

_NORMS = {"linf": 0, "l2": 1, "sign_l2": 2}


class _Call(ctypes.Structure):
    """PgdCall of csrc/cpu/pgd.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "clean", "step", "eps", "mean", "std", "mask", "active")),
        ("samples", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("seed", "offset", "stream", "batch", "count", "channels", "channel_step", "threads", "bytes")
        ),
        ("norm", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]


def refusal(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if args.x_adv.dtype != torch.float32:
        return f"x_adv is {args.x_adv.dtype}, and these kernels store float32"
    if args.levels:
        return "levels is done by the reference alone"
    if function == "pgd_random_start_" and args.norm != "linf":
        return f"the {args.norm} start is done by the reference alone"
    return None


def pgd_step_(args: StepArguments) -> None:
    """As the reference: linf in one pass, l2 and sign_l2 in two."""
    if not args.x_adv.numel():
        return
    layout = Layout(args.x_adv)
    step = _each(args.step_size, args.step_number, layout.x)
    active = None if args.active is None else args.active.view(torch.uint8)
    _run("pgd_step", args, layout, grad=layout.alike(args.grad.float()), step=step, active=active)


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference, to the bit, for linf."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    if x_adv.is_contiguous():
        _run("pgd_start", args, Layout(x_adv), samples=args.sample_ids)
        return
    x = torch.empty(x_adv.shape)
    _run("pgd_start", args, Layout(x), samples=args.sample_ids)
    x_adv.copy_(x)


def _each(values: Tensor | None, number: float, x: Tensor) -> Tensor:
    """[B] of a number for each sample, or of the one for all."""
    return torch.full((len(x),), number) if values is None else values


def _run(
    function: str,
    args: StepArguments | StartArguments,
    layout: Layout,
    *,
    grad: Tensor | None = None,
    step: Tensor | None = None,
    active: Tensor | None = None,
    samples: Tensor | None = None,
) -> None:
    """Change the x of the layout; grad lies as it does."""
    x, eps = layout.x, _each(args.eps, args.eps_number, layout.x)
    clean = layout.alike(args.clean if args.clean.dtype == torch.uint8 else args.clean.float())
    alike = {"grad": grad, "clean": clean, "mask": layout.mask(args.mask)}  # kept alive until the call is over
    flat = {"step": step, "eps": eps, "mean": args.mean, "std": args.std, "active": active, "samples": samples}
    tensors = alike | {name: None if v is None else v.contiguous() for name, v in flat.items()}
    place = () if isinstance(args, StepArguments) else map(int, place_of(args))
    record = _Call(
        size=ctypes.sizeof(_Call),
        x=native.pointer(x),
        **{name: native.pointer(v) for name, v in tensors.items()},
        **dict(zip(("seed", "offset", "stream"), place, strict=False)),
        batch=len(x),
        count=layout.count,
        channels=layout.channels,
        channel_step=layout.channel_step,
        threads=native.threads(),
        bytes=args.clean.dtype == torch.uint8,
        norm=_NORMS[args.norm],
        low=args.clip_low,
        high=args.clip_high,
    )
    native.call(function, record)
    layout.finish()

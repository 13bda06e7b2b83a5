"""The compiled PGD kernels of csrc/cpu/pgd.cpp, called as the reference is.

linf, step and start, equals the reference to the bit; l2 and sign_l2 agree to float32's rounding. Results have the same
bits whatever the number of threads and the processor's level. Channels-last tensors are changed where they lie, others
that are not contiguous in a copy.
"""

import ctypes

import torch
from torch import Tensor

from poisonshield.ops import native
from poisonshield.ops.pgd.layout import expanded_mask
from poisonshield.ops.pgd.reference import StartArguments, StepArguments

_NORMS = {"linf": 0, "l2": 1, "sign_l2": 2}


class _Call(ctypes.Structure):
    """PgdCall of csrc/cpu/pgd.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "clean", "step", "eps", "mean", "std", "mask", "active")),
        ("samples", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("seed", "offset", "stream", "batch", "count", "channels", "threads")),
        *((name, ctypes.c_int32) for name in ("bytes", "channel_last", "norm")),
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
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    order = _order(x_adv)
    x = x_adv.permute(order).contiguous()  # x_adv itself where it is dense in that order
    active = None if args.active is None else args.active.to(torch.uint8)
    _run("pgd_step", args, x, order, grad=args.grad.float(), step=args.step_size, active=active)
    if x.data_ptr() != x_adv.data_ptr():
        x_adv.copy_(x)


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference, to the bit, for linf."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    order = list(range(x_adv.dim()))  # numbers are drawn in it
    x = x_adv if x_adv.is_contiguous() else torch.empty(x_adv.shape)
    _run("pgd_start", args, x, order, samples=args.sample_ids)
    if x is not x_adv:
        x_adv.copy_(x)


def _order(x: Tensor) -> list[int]:
    """The dimensions of x from the outermost in memory to the innermost: rows, or channels last."""
    plain = list(range(x.dim()))
    last = [0, *plain[2:], 1]
    return last if not x.is_contiguous() and x.permute(last).is_contiguous() else plain


def _run(
    function: str,
    args: StepArguments | StartArguments,
    x: Tensor,
    order: list[int],
    *,
    grad: Tensor | None = None,
    step: Tensor | None = None,
    active: Tensor | None = None,
    samples: Tensor | None = None,
) -> None:
    """Change x, contiguous and in `order`; the other tensors are as the record has them."""
    clean, mask = args.clean, expanded_mask(args.mask, args.x_adv)
    if clean.dtype != torch.uint8:
        clean = clean.float()
    alike = {"grad": grad, "clean": clean, "mask": mask}  # of the shape of x
    tensors = {name: None if v is None else v.permute(order).contiguous() for name, v in alike.items()}
    flat = {"step": step, "eps": args.eps, "mean": args.mean, "std": args.std, "active": active, "samples": samples}
    tensors |= {name: None if v is None else v.contiguous() for name, v in flat.items()}
    whole = {} if isinstance(args, StepArguments) else {n: int(getattr(args, n)) for n in ("seed", "offset", "stream")}
    record = _Call(
        size=ctypes.sizeof(_Call),
        x=native.pointer(x),
        **{name: native.pointer(v) for name, v in tensors.items()},
        **whole,
        batch=len(x),
        count=x[0].numel(),
        channels=args.x_adv.shape[1],
        threads=native.threads(),
        bytes=args.clean.dtype == torch.uint8,
        channel_last=order[-1] == 1 and len(order) > 2,
        norm=_NORMS[args.norm],
        low=args.clip_low,
        high=args.clip_high,
    )
    native.call(function, record)

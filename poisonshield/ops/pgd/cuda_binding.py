"""The compiled PGD kernels of csrc/pgd.cu, called as the reference is."""

import math

import torch
from torch import Tensor

from poisonshield.ops.pgd.layout import Layout, refused
from poisonshield.ops.pgd.reference import Space, StartArguments, StepArguments

_CHUNK = 1024  # elements of a block at least: kThreads * kEach<float> in csrc


def refusal(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    return refused(args)


def pgd_step_(args: StepArguments) -> None:
    """As the reference: linf in one pass, l2 and sign_l2 in two."""
    if not args.x_adv.numel():
        return
    layout, operators = Layout(args.x_adv), torch.ops.poisonshield_cuda
    grad, clean = _pixels(args, args.grad)
    tensors = (
        layout.x,
        layout.alike(grad),
        layout.alike(clean),
        args.step_size,
        args.step_number,
        args.eps,
        args.eps_number,
        args.mean,
        args.std,
        layout.mask(args.mask),
        None if args.active is None else args.active.view(torch.uint8),
    )
    clip = args.clip_low, args.clip_high
    if args.norm == "linf":
        operators.linf_step_(*tensors, *clip, layout.channel_step)
    else:
        operators.ball_step_(*tensors, _sums(layout, 3), *clip, layout.channel_step, args.norm == "sign_l2")
    layout.finish()


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference: in linf to the bit, in l2 and sign_l2 to a few units in the last place."""
    if not args.x_adv.numel():
        return
    layout, operators = Layout(args.x_adv, row_major=True), torch.ops.poisonshield_cuda
    (clean,) = _pixels(args)
    tensors = (
        layout.x,
        layout.alike(clean),
        args.eps,
        args.eps_number,
        args.seed,
        args.seed_number,
        args.offset,
        args.offset_number,
        args.stream,
        args.stream_number,
        args.sample_ids.contiguous(),
        args.mean,
        args.std,
        layout.mask(args.mask),
    )
    numbers = args.clip_low, args.clip_high, layout.channel_step, layout.columns
    if args.norm == "linf":
        operators.linf_start_(*tensors, *numbers)
    else:
        operators.ball_start_(*tensors, _sums(layout, 2), *numbers)
    layout.finish()


def _pixels(args: StepArguments | StartArguments, *others: Tensor) -> tuple[Tensor, ...]:
    """Others and clean in types that are compiled: all as x_adv, else all float32; beside float32, clean in bytes."""
    x_adv, clean = args.x_adv, args.clean
    if x_adv.dtype == torch.float32 and clean.dtype == torch.uint8:
        return *(v.float() for v in others), clean
    if all(v.dtype == x_adv.dtype for v in (*others, clean)):
        return *others, clean
    return *(v.float() for v in others), Space(args).clean


def _sums(layout: Layout, numbers: int) -> Tensor:
    """Room for so many float64 sums of each block."""
    blocks = len(layout.x) * math.ceil(layout.count / _CHUNK)
    return torch.empty((blocks, numbers), dtype=torch.float64, device=layout.x.device)

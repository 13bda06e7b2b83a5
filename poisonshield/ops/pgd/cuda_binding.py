"""The compiled PGD kernels of csrc/pgd.cu, called as the reference is."""

import torch
from torch import Tensor

from poisonshield.ops.pgd.layout import expanded_mask, float32_only
from poisonshield.ops.pgd.reference import StartArguments, StepArguments

_CHUNK = 1024  # elements of a block: kChunk in csrc/pgd.cu


def refusal(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    return float32_only(function, args)


def pgd_step_(args: StepArguments) -> None:
    """As the reference: linf in one pass, l2 and sign_l2 in two."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    channels = x_adv.shape[1] if args.std is not None else 1  # a sample is one row where channels are alike
    operators, is_bytes = torch.ops.poisonshield_cuda, args.clean.dtype == torch.uint8
    tensors = (
        x_adv,
        args.grad.float().contiguous(),
        _pixels(args.clean),
        args.step_size,
        args.eps,
        args.mean,
        args.std,
        expanded_mask(args.mask, x_adv),
        None if args.active is None else args.active.to(torch.uint8),
    )
    if args.norm == "linf":
        operators.linf_step_(*tensors, args.clip_low, args.clip_high, channels, is_bytes)
        return
    inner = x_adv[0].numel() // channels
    sums = x_adv.new_empty((len(x_adv) * channels * -(-inner // _CHUNK), 3), dtype=torch.float64)
    is_sign = args.norm == "sign_l2"
    operators.ball_step_(*tensors, sums, args.clip_low, args.clip_high, channels, is_bytes, is_sign)


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference, to the bit, for linf."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    torch.ops.poisonshield_cuda.linf_start_(
        x_adv,
        _pixels(args.clean),
        args.eps,
        args.seed,
        args.offset,
        args.sample_ids.contiguous(),
        args.stream,
        args.mean,
        args.std,
        expanded_mask(args.mask, x_adv),
        args.clip_low,
        args.clip_high,
        x_adv.shape[1],
        args.clean.dtype == torch.uint8,
    )


def _pixels(clean: Tensor) -> Tensor:
    """clean as the kernels read it: uint8 or float32, contiguous."""
    return (clean if clean.dtype == torch.uint8 else clean.float()).contiguous()

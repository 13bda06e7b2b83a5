"""What both kernel backends of the PGD ops need: which calls they take, and tensors laid out as they read them."""

import torch
from torch import Tensor

from poisonshield.ops.pgd.reference import StartArguments, StepArguments


def float32_only(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why float32 kernels on whole rows cannot take a call, or None."""
    if args.x_adv.dtype != torch.float32:
        return f"x_adv is {args.x_adv.dtype}, and these kernels store float32"
    if not args.x_adv.is_contiguous():
        return "x_adv is not contiguous"
    if args.levels:
        return "levels is done by the reference alone"
    if function == "pgd_random_start_" and args.norm != "linf":
        return f"the {args.norm} start is done by the reference alone"
    return None


def expanded_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """uint8 of the shape of x, 0 or 1."""
    return None if mask is None else (mask != 0).to(torch.uint8).expand(x.shape).contiguous()

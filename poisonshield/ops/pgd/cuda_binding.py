"""The compiled PGD kernels of csrc/pgd.cu, called as the reference is."""

from typing import Any

import torch
from torch import Tensor

from poisonshield.ops.pgd.layout import expanded_mask, float32_only

_CHUNK = 1024  # elements of a block: kChunk in csrc/pgd.cu


def refusal(function: str, *args: Any) -> str | None:
    """Why these kernels cannot take a call."""
    return float32_only(function, *args)


def pgd_step_(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step: Tensor, eps: Tensor, norm: str, mean: Tensor | None,
    std: Tensor | None, clip_low: float, clip_high: float, mask: Tensor | None, active: Tensor | None, levels: int,
) -> None:  # fmt: skip
    """linf in one pass, l2 and sign_l2 in two."""
    if not x_adv.numel():
        return
    channels = x_adv.shape[1] if std is not None else 1
    tensors = x_adv, grad.float().contiguous(), _pixels(x0), step, eps, mean, std, expanded_mask(mask, x_adv)
    active = None if active is None else active.to(torch.uint8)
    ops, bytes_ = torch.ops.poisonshield_cuda, x0.dtype == torch.uint8
    if norm == "linf":
        ops.linf_step_(*tensors, active, clip_low, clip_high, channels, bytes_)
        return
    inner = x_adv[0].numel() // channels
    sums = x_adv.new_empty((len(x_adv) * channels * -(-inner // _CHUNK), 3), dtype=torch.float64)
    ops.ball_step_(*tensors, active, sums, clip_low, clip_high, channels, bytes_, norm == "sign_l2")


def pgd_random_start_(
    x_adv: Tensor, x0: Tensor, eps: Tensor, norm: str, seed: Tensor, offset: Tensor, sample_ids: Tensor, stream: Tensor,
    mean: Tensor | None, std: Tensor | None, clip_low: float, clip_high: float, mask: Tensor | None, levels: int,
) -> None:  # fmt: skip
    """linf, equal to the reference to the bit."""
    if not x_adv.numel():
        return
    torch.ops.poisonshield_cuda.linf_start_(
        x_adv, _pixels(x0), eps, seed, offset, sample_ids.contiguous(), stream, mean, std, expanded_mask(mask, x_adv),
        clip_low, clip_high, x_adv.shape[1], x0.dtype == torch.uint8,
    )  # fmt: skip


def _pixels(x0: Tensor) -> Tensor:
    return (x0 if x0.dtype == torch.uint8 else x0.float()).contiguous()

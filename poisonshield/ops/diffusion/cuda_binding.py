"""The compiled diffusion kernels of csrc/diffusion.cu, called as the reference is."""

from typing import Any

import torch
from torch import Tensor

from poisonshield.ops.diffusion.layout import strided_mask
from poisonshield.ops.diffusion.reference import row_scale

_CHUNK = 1024  # elements of a block: kChunk in csrc/diffusion.cu
_KINDS = {"given": 0, "epsilon": 1, "v": 2, "sample": 3}
_LOSSES = {"mse": 0, "huber": 1, "l1": 2}


def refusal(function: str, *args: Any) -> str | None:
    """Why these kernels cannot take a call."""
    if function == "q_sample_backward":
        return "two products, which the reference does as well"
    pixels = args[:1] + args[3:4] if function == "q_sample" else args[:4]
    wrong = [v.dtype for v in pixels if isinstance(v, Tensor) and v.dtype != torch.float32]
    if wrong or (function == "q_sample" and args[-1] != torch.float32):
        return f"a tensor is {wrong[0] if wrong else args[-1]}, and these kernels take float32"
    return None


def q_sample(
    x0: Tensor, t: Tensor, alphas_cumprod: Tensor, noise: Tensor | None, seed: Tensor, offset: Tensor, stream: Tensor,
    return_noise: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference; drawn noise equals it to a few units in the last place."""
    source = x0.contiguous()
    out = torch.empty_like(source)
    kept = source.new_empty(source.shape if return_noise else 0)
    if x0.numel():
        given = None if noise is None else noise.contiguous()
        torch.ops.poisonshield_cuda.noising_(
            out, kept, source, given, t, alphas_cumprod.float(), seed, offset, stream, return_noise
        )
    return torch.empty_like(x0).copy_(out), kept


def diffusion_loss(
    pred: Tensor, target: Tensor | None, x0: Tensor | None, noise: Tensor | None, t: Tensor | None,
    alphas_cumprod: Tensor | None, prediction_type: str, seed: Tensor, offset: Tensor, stream: Tensor,
    mask: Tensor | None, weight: Tensor | None, gamma: float, loss: str, delta: float, normalise: str, pred_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference."""
    scale = row_scale(
        pred, t, alphas_cumprod, prediction_type, mask, weight, gamma, normalise, torch.float32
    ).contiguous()
    losses = torch.zeros_like(scale)
    if not pred.numel():
        return losses, torch.empty_like(pred) if pred_grad else pred.new_empty(0)
    p = pred.contiguous()
    sources = [None if v is None else v.contiguous() for v in (target, x0, noise)]
    inner = p[0, 0].numel()
    mask, row, channel = (None, 0, 0) if mask is None else strided_mask(mask.float(), pred)
    grad = torch.empty_like(p) if pred_grad else p.new_empty(0)
    sums = p.new_empty((len(p), -(-p[0].numel() // _CHUNK)), dtype=torch.float64)
    torch.ops.poisonshield_cuda.loss_(
        losses, grad, sums, p, *sources, t, None if alphas_cumprod is None else alphas_cumprod.float(),
        seed, offset, stream, mask, scale, _KINDS["given" if target is not None else prediction_type], _LOSSES[loss],
        delta, inner, row, channel, pred_grad,
    )  # fmt: skip
    return losses, torch.empty_like(pred).copy_(grad) if pred_grad else grad

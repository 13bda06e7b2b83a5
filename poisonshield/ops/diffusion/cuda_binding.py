"""The compiled diffusion kernels of csrc/diffusion.cu, called as the reference is."""

import torch
from torch import Tensor

from poisonshield.ops.diffusion.layout import strided_mask
from poisonshield.ops.diffusion.reference import LossArguments, NoisingArguments, NoisingGradientArguments, row_scale

_CHUNK = 1024  # elements of a block: kChunk in csrc/diffusion.cu
_KINDS = {"given": 0, "epsilon": 1, "v": 2, "sample": 3}
_LOSSES = {"mse": 0, "huber": 1, "l1": 2}


def refusal(function: str, args: NoisingArguments | NoisingGradientArguments | LossArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if isinstance(args, NoisingGradientArguments):
        return "two products, which the reference does as well"
    pixels: tuple[Tensor | None, ...]
    if isinstance(args, NoisingArguments):
        pixels, out_dtype = (args.x0, args.noise), args.out_dtype
    else:
        pixels, out_dtype = (args.pred, args.target, args.x0, args.noise), torch.float32
    wrong = [d for d in (*(v.dtype for v in pixels if v is not None), out_dtype) if d != torch.float32]
    return f"a tensor is {wrong[0]}, and these kernels take float32" if wrong else None


def q_sample(args: NoisingArguments) -> tuple[Tensor, Tensor]:
    """As the reference; drawn noise equals it to a few units in the last place."""
    source = args.x0.contiguous()
    out = torch.empty_like(source)
    kept = source.new_empty(source.shape if args.return_noise else 0)
    if source.numel():
        torch.ops.poisonshield_cuda.noising_(
            out,
            kept,
            source,
            None if args.noise is None else args.noise.contiguous(),
            args.t,
            args.alphas_cumprod.float(),
            args.seed,
            args.offset,
            args.stream,
            args.return_noise,
        )
    return torch.empty_like(args.x0).copy_(out), kept


def diffusion_loss(args: LossArguments) -> tuple[Tensor, Tensor]:
    """As the reference."""
    pred, scale = args.pred, row_scale(args, torch.float32).contiguous()  # [B, C, ...], [B]
    losses = torch.zeros_like(scale)
    if not pred.numel():
        return losses, torch.empty_like(pred) if args.pred_grad else pred.new_empty(0)
    p = pred.contiguous()
    mask, row, channel = (None, 0, 0) if args.mask is None else strided_mask(args.mask.float(), pred)
    grad = torch.empty_like(p) if args.pred_grad else p.new_empty(0)
    torch.ops.poisonshield_cuda.loss_(
        losses,
        grad,
        p.new_empty((len(p), -(-p[0].numel() // _CHUNK)), dtype=torch.float64),  # a sum for each block
        p,
        *(None if v is None else v.contiguous() for v in (args.target, args.x0, args.noise)),
        args.t,
        None if args.alphas_cumprod is None else args.alphas_cumprod.float(),
        args.seed,
        args.offset,
        args.stream,
        mask,
        scale,
        _KINDS["given" if args.target is not None else args.prediction_type],
        _LOSSES[args.loss],
        args.delta,
        p[0, 0].numel(),
        row,
        channel,
        args.pred_grad,
    )
    return losses, torch.empty_like(pred).copy_(grad) if args.pred_grad else grad

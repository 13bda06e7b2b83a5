"""The compiled diffusion kernels of csrc/diffusion.cu, called as the reference is."""

import torch
from torch import Tensor

from poisonshield.ops.diffusion.layout import MOST, finished, in_order_of, result_like, strided_mask
from poisonshield.ops.diffusion.reference import LossArguments, NoisingArguments, NoisingGradientArguments, row_scale

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_THREADS, _BYTES = 256, 16  # of a block, and how many bytes each of them reads at once: kThreads, kBytes in csrc
_KINDS = {"given": 0, "epsilon": 1, "v": 2, "sample": 3}
_LOSSES = {"mse": 0, "huber": 1, "l1": 2}


def refusal(function: str, args: NoisingArguments | NoisingGradientArguments | LossArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if isinstance(args, NoisingGradientArguments):
        return "two products, which the reference does as well"
    if args[0][:1].numel() > MOST:
        return f"a sample of over {MOST:,} elements"
    if isinstance(args, NoisingArguments):
        return _refuse_dtypes((args.x0, args.noise), args.out_dtype)
    return _refuse_dtypes((args.target, args.x0, args.noise), args.pred.dtype)


def _refuse_dtypes(given: tuple[Tensor | None, ...], result: torch.dtype) -> str | None:
    """Kernels read tensors of one dtype, float32 or that of the result, which may be any of three."""
    dtypes = [v.dtype for v in given if v is not None] or [result]
    for dtype in (*dtypes, result):
        if dtype not in _FLOATS:
            return f"a tensor is {dtype}, and these kernels take float32, float16 and bfloat16"
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.float32, result):
        return f"tensors are {', '.join(map(str, dtypes))} beside {result}, and these kernels take float32 beside it"
    return None


def q_sample(args: NoisingArguments) -> tuple[Tensor, Tensor]:
    """As the reference; drawn noise equals it to a few units in the last place."""
    result, out = result_like(args.x0, args.out_dtype)
    noise, kept = result_like(args.x0) if args.return_noise else (args.x0.new_empty(0),) * 2
    if out.numel():
        torch.ops.poisonshield_cuda.noising_(
            out,
            kept,
            in_order_of(out, args.x0),
            None if args.noise is None else in_order_of(out, args.noise),
            args.t,
            args.alphas_cumprod.float(),
            args.seed,
            args.offset,
            args.stream,
            args.return_noise,
        )
    return finished(result, out), finished(noise, kept)


def diffusion_loss(args: LossArguments) -> tuple[Tensor, Tensor]:
    """As the reference."""
    pred, scale = args.pred, row_scale(args, torch.float32).contiguous()  # [B, C, ...], [B]
    if not pred.numel():
        return torch.zeros_like(scale), torch.empty_like(pred) if args.pred_grad else pred.new_empty(0)
    losses = torch.empty_like(scale)
    result, grad = result_like(pred)
    p = in_order_of(grad, pred)
    mask, row, channel = (None, 0, 0) if args.mask is None else strided_mask(args.mask.float(), pred)
    chunk = _THREADS * _BYTES // pred.element_size()
    torch.ops.poisonshield_cuda.loss_(
        losses,
        grad,
        scale.new_empty((len(p), -(-p[0].numel() // chunk)), dtype=torch.float64),  # a sum for each block
        p,
        *(None if v is None else in_order_of(grad, v) for v in (args.target, args.x0, args.noise)),
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
    return losses, finished(result, grad) if args.pred_grad else pred.new_empty(0)

"""Triton kernels of noising and of the masked loss.

q_sample: elementwise, grid (chunks, samples); the two factors of a sample come from alphas_cumprod in the kernel, and a
seed draws the noise there (each lane computes the word it needs: integer work instead of memory). The loss: one pass
writes dL/dpred and a partial sum per chunk, reading each of pred, target and mask once; the partial sums of a row are
then added in a fixed order. No atomics. Offsets are 64 bits wide, those within a sample 32. Row scales (weights over
areas) are computed before by the reference's own few small operations. Memory is taken as it lies: see layout.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.diffusion.layout import MOST, by_sites, finished, in_order_of, result_like, strided_mask
from poisonshield.ops.diffusion.reference import LossArguments, NoisingArguments, NoisingGradientArguments, row_scale
from poisonshield.ops.record import tensors
from poisonshield.ops.trigonometry import cosine_of_turns

_BLOCK = 1024
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_LOSSES = {"mse": 0, "huber": 1, "l1": 2}
_GIVEN, _EPSILON, _V, _SAMPLE = range(4)
_KINDS = {"epsilon": _EPSILON, "v": _V, "sample": _SAMPLE}


@triton.jit
def uniform(seed, offset, stream, b, element):
    """The word of `element` in the stream of sample b, as a float in [0, 1): see random.py."""
    block = (element // 4).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(
        seed.to(tl.uint64, bitcast=True),
        block,
        zero + b.to(tl.uint32),
        zero + (offset & 0xFFFFFFFF).to(tl.uint32),
        zero + (stream & 0xFFFFFFFF).to(tl.uint32),
    )
    place = element % 4
    word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def normal(seed, offset, stream, b, element, count):
    """Box-Muller: the first half of a sample's numbers are cosines, the second half sines of the same pairs."""
    pairs = (count + 1) // 2
    pair = tl.where(element < pairs, element, element - pairs)
    radius = tl.sqrt(-2.0 * tl.log(1.0 - uniform(seed, offset, stream, b, pair)))
    return radius * cosine_of_turns(uniform(seed, offset, stream, b, pairs + pair), tl.where(element < pairs, 0, 3))


@triton.jit
def place(element, channels, inner, SITES: tl.constexpr):
    """(channel, site) of an element as memory lies: by rows, or, with SITES, the channels of a site side by side."""
    if SITES:
        return element % channels, element // channels
    else:
        return element // inner, element % inner


@triton.jit
def noising(
    out_ptr,  # [B, count] x_t, written
    kept_ptr,  # [B, count] the noise, written if KEEP
    x0_ptr,  # [B, count] clean pixels or latents
    noise_ptr,  # [B, count] given noise, read unless DRAW
    t_ptr,  # [B] int64, timesteps
    alphas_ptr,  # [T] float32, cumulative products of alphas
    seed_ptr,  # [] int64, and the next two: where in Philox's numbers the noise lies
    offset_ptr,  # [] int64
    stream_ptr,  # [] int64
    count,  # elements of a sample
    channels,  # of a sample
    inner,  # elements of a channel
    SITES: tl.constexpr,  # whether the channels of a site lie side by side
    DRAW: tl.constexpr,  # whether the noise is drawn here
    KEEP: tl.constexpr,  # whether drawn noise is stored
    BLOCK: tl.constexpr,  # elements of a program
):
    """x_t, and the noise that was drawn; a program takes BLOCK elements of one sample."""
    b = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    at = b.to(tl.int64) * count + element
    a = tl.load(alphas_ptr + tl.load(t_ptr + b)).to(tl.float32)
    x0 = tl.load(x0_ptr + at, mask=inside, other=0).to(tl.float32)
    if DRAW:
        channel, site = place(element, channels, inner, SITES)
        number = channel * inner + site
        noise = normal(tl.load(seed_ptr), tl.load(offset_ptr), tl.load(stream_ptr), b, number, count)
        noise = noise.to(x0_ptr.dtype.element_ty).to(tl.float32)
        if KEEP:
            tl.store(kept_ptr + at, noise, mask=inside)
    else:
        noise = tl.load(noise_ptr + at, mask=inside, other=0).to(tl.float32)
    # x_t = sqrt(a) x0 + sqrt(1 - a) noise. Reads x0 (and noise), writes x_t (and noise).
    tl.store(out_ptr + at, tl.sqrt_rn(a) * x0 + tl.sqrt_rn(1.0 - a) * noise, mask=inside)


@triton.jit
def loss_and_gradient(
    pred_ptr,  # [B, count] what the network says
    target_ptr,  # [B, count] what it should say, read if KIND is 0
    x0_ptr,  # [B, count], read if KIND is 2 or 3
    noise_ptr,  # [B, count], read if KIND is 1 or 2, unless DRAW
    mask_ptr,  # weights of elements, strided (see mask_row), read if HAS_MASK
    t_ptr,  # [B] int64, timesteps, read if KIND is 2
    alphas_ptr,  # [T] float32, cumulative products of alphas, read if KIND is 2
    seed_ptr,  # [] int64, and the next two: where in Philox's numbers the noise lies
    offset_ptr,  # [] int64
    stream_ptr,  # [] int64
    scale_ptr,  # [B] float32: what a row's sum is multiplied by
    grad_ptr,  # [B, count] d loss/d pred, written if GRAD
    sums_ptr,  # [B, chunks] float32: sums of the masked loss, before the scale, written
    delta,  # where huber turns linear
    count,  # elements of a sample
    channels,  # of a sample
    inner,  # elements of a channel
    mask_row,  # steps in the mask from one sample to the next, 0 where it repeats itself
    mask_channel,  # steps from one channel to the next, 0 where it repeats itself
    chunks,  # programs of a sample
    SITES: tl.constexpr,  # whether the channels of a site lie side by side
    KIND: tl.constexpr,  # the target: 0 given, 1 epsilon, 2 v, 3 sample
    DRAW: tl.constexpr,  # whether the noise is drawn here
    LOSS: tl.constexpr,  # 0 mse, 1 huber, 2 l1
    HAS_MASK: tl.constexpr,  # whether there is a mask
    GRAD: tl.constexpr,  # whether the gradient is wanted
    BLOCK: tl.constexpr,  # elements of a program
):
    """d loss/d pred and a partial sum of the loss; a program takes BLOCK elements of one sample."""
    b = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    row = b.to(tl.int64)
    at = row * count + element
    channel, site = place(element, channels, inner, SITES)
    pred = tl.load(pred_ptr + at, mask=inside, other=0).to(tl.float32)
    if KIND == 0:  # given
        target = tl.load(target_ptr + at, mask=inside, other=0).to(tl.float32)
    elif KIND == 3:  # sample
        target = tl.load(x0_ptr + at, mask=inside, other=0).to(tl.float32)
    else:
        if DRAW:
            number = channel * inner + site
            noise = normal(tl.load(seed_ptr), tl.load(offset_ptr), tl.load(stream_ptr), b, number, count)
            noise = noise.to(pred_ptr.dtype.element_ty).to(tl.float32)
        else:
            noise = tl.load(noise_ptr + at, mask=inside, other=0).to(tl.float32)
        target = noise
        if KIND == 2:  # v
            a = tl.load(alphas_ptr + tl.load(t_ptr + b)).to(tl.float32)
            x0 = tl.load(x0_ptr + at, mask=inside, other=0).to(tl.float32)
            target = tl.sqrt_rn(a) * noise - tl.sqrt_rn(1.0 - a) * x0
    # loss = scale * sum(m l(r)), d loss/d pred = scale * m l'(r). Each of pred, target and mask is read once.
    r = pred - target
    size = tl.abs(r)
    if LOSS == 0:
        value, slope = r * r, 2.0 * r
    elif LOSS == 1:
        value = tl.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))
        slope = tl.where(size <= delta, r, tl.where(r > 0, delta, -delta))
        slope = tl.where(r != r, r, slope)
    else:
        value, slope = size, tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, r))
    if HAS_MASK:
        weight = row * mask_row + channel * mask_channel + site
        m = tl.load(mask_ptr + weight, mask=inside, other=0).to(tl.float32)
        value = tl.where(m != 0, value * m, 0.0)  # selected, so that NaN under the mask stays there
        slope = tl.where(m != 0, slope * m, 0.0)
    if GRAD:
        tl.store(grad_ptr + at, slope * tl.load(scale_ptr + b), mask=inside)
    tl.store(sums_ptr + row * chunks + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0)))


def refusal(function: str, args: NoisingArguments | NoisingGradientArguments | LossArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if len(args[0]) > 65535:
        return "a batch of over 65,535 samples exceeds the grid"
    if isinstance(args, NoisingGradientArguments):
        return "two products, which the reference does as well"
    if args[0][:1].numel() > MOST:
        return f"a sample of over {MOST:,} elements"
    if any(v.dtype == torch.float64 and v.dim() > 1 for v in tensors(args)):  # alphas_cumprod [T] may be float64
        return "float64 is for the reference"
    return None


def q_sample(args: NoisingArguments) -> tuple[Tensor, Tensor]:
    """As the reference; drawn noise equals it to a few units in the last place."""
    x0, drawing = args.x0, args.noise is None
    result, out = result_like(x0, args.out_dtype)
    noise, kept = result_like(x0) if args.return_noise else (x0.new_empty(0),) * 2
    if x0.numel():
        source = in_order_of(out, x0)
        given = source if args.noise is None else in_order_of(out, args.noise)
        count, inner = x0[0].numel(), x0[0, 0].numel()
        noising[(triton.cdiv(count, _BLOCK), len(x0))](
            out, kept, source, given, args.t, args.alphas_cumprod.float(), args.seed, args.offset, args.stream,
            count, x0.shape[1], inner, SITES=by_sites(out), DRAW=drawing, KEEP=args.return_noise and drawing,
            BLOCK=_BLOCK, **_OPTIONS,
        )  # fmt: skip
        if args.noise is not None and args.return_noise:
            kept.copy_(args.noise)
    return finished(result, out), finished(noise, kept)


def diffusion_loss(args: LossArguments) -> tuple[Tensor, Tensor]:
    """As the reference."""
    pred, scale = args.pred, row_scale(args, torch.float32).contiguous()  # [B, C, ...], [B]
    if not pred.numel():
        return scale * 0, torch.empty_like(pred) if args.pred_grad else pred.new_empty(0)
    kind = _GIVEN if args.target is not None else _KINDS[args.prediction_type]
    result, grad = result_like(pred)
    p = in_order_of(grad, pred)  # stands too for a tensor that is absent, since a pointer must point somewhere
    sources = [p if v is None else in_order_of(grad, v) for v in (args.target, args.x0, args.noise)]
    count, inner = p[0].numel(), p[0, 0].numel()
    mask, row, channel = p, 0, 0
    if args.mask is not None:
        weights = args.mask.to(torch.uint8) if args.mask.dtype == torch.bool else args.mask
        mask, row, channel = strided_mask(weights, pred)
    t = p if args.t is None else args.t
    alphas = p if args.alphas_cumprod is None else args.alphas_cumprod.float()
    chunks = triton.cdiv(count, _BLOCK)
    sums = torch.empty((len(p), chunks), dtype=torch.float32, device=p.device)
    loss_and_gradient[(chunks, len(p))](
        p, *sources, mask, t, alphas, args.seed, args.offset, args.stream, scale, grad, sums,
        args.delta, count, p.shape[1], inner, row, channel, chunks,
        SITES=by_sites(grad), KIND=kind, DRAW=args.noise is None and kind in (_EPSILON, _V), LOSS=_LOSSES[args.loss],
        HAS_MASK=args.mask is not None, GRAD=args.pred_grad, BLOCK=_BLOCK, **_OPTIONS,
    )  # fmt: skip
    return sums.sum(1) * scale, finished(result, grad) if args.pred_grad else pred.new_empty(0)


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]]:
    """(name, kernel, signature, constants, options, arguments divisible by 16): what is compiled ahead of time."""
    kinds = dict.fromkeys(("out_ptr", "kept_ptr", "x0_ptr", "noise_ptr", "pred_ptr", "target_ptr", "grad_ptr"), "*fp32")
    kinds |= dict.fromkeys(("alphas_ptr", "scale_ptr", "sums_ptr", "mask_ptr"), "*fp32") | {"delta": "fp32"}
    kinds |= dict.fromkeys(("t_ptr", "seed_ptr", "offset_ptr", "stream_ptr"), "*i64")
    kinds |= dict.fromkeys(("count", "channels", "inner", "mask_row", "mask_channel", "chunks"), "i32")
    halves = {n: "*bf16" for n in ("out_ptr", "kept_ptr", "x0_ptr", "noise_ptr", "pred_ptr", "target_ptr", "grad_ptr")}
    cases = []
    given = {"KIND": 0, "DRAW": False, "LOSS": 0, "HAS_MASK": True, "GRAD": True}
    for name, kernel, constants, own in (
        ("noising", noising, {"DRAW": False, "KEEP": False}, kinds),
        ("noising_drawn", noising, {"DRAW": True, "KEEP": True}, kinds),
        ("noising_bf16", noising, {"DRAW": False, "KEEP": False}, kinds | halves),
        ("noising_drawn_sites", noising, {"DRAW": True, "KEEP": True, "SITES": True}, kinds),
        ("loss_given", loss_and_gradient, given, kinds),
        ("loss_v", loss_and_gradient, given | {"KIND": 2, "LOSS": 1}, kinds),
        ("loss_drawn", loss_and_gradient, given | {"KIND": 1, "DRAW": True, "LOSS": 2, "HAS_MASK": False}, kinds),
        ("loss_bf16", loss_and_gradient, given, kinds | halves),
        ("loss_given_sites", loss_and_gradient, given | {"SITES": True}, kinds),
    ):
        constants = {"SITES": False, "BLOCK": _BLOCK} | constants
        signature = {n: "constexpr" if n in constants else own[n] for n in kernel.arg_names}
        even = tuple(n for n in kernel.arg_names if n.endswith("_ptr") or n in ("count", "inner"))
        cases.append((name, kernel, signature, constants, dict(_OPTIONS), even))
    return cases

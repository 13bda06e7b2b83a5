"""Triton kernels of the PGD step and random start, on float32 and half precision, in any dense order of dimensions.

linf: one pass, 16 bytes an element in float32. l2 and sign_l2: a first pass leaves sums of v^2, d v and d^2 (v the
direction, d = x - clean) per program, from which the second knows the length after the step,
|d|^2 + 2 a <d, v> + a^2 |v|^2, without reading twice more; each program adds the partial sums in the same order. Sums
are float64, since squares of small gradients vanish in float32. The start in a ball draws its Gaussian direction twice,
once for its length, and stores nothing between.
The grid has one axis (CUDA's others end at 65,535). No atomics. Compiled without fused multiply-adds, so that
linf steps and starts equal the reference to the bit. A sample starts at a 64-bit offset.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.pgd.layout import Layout, refused
from poisonshield.ops.pgd.reference import StartArguments, StepArguments, place_of
from poisonshield.ops.pgd.triton_parts import (
    clip,
    direction,
    element_of,
    fraction,
    limits,
    normal,
    of_sample,
    original,
    places,
    scaled,
    sign,
    statistics,
    store,
    total,
    uniform,
    words,
)

_BLOCK = 1024
_PARTS = 128  # partial sums that a program adds at a time
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def linf_step(
    x_ptr,  # [B, count] x_adv, changed in place
    g_ptr,  # [B, count] d loss/d x_adv
    clean_ptr,  # [B, count] the original: floats in the space of x_adv, or uint8 pixels
    step_ptr,  # [B] how far to go, in pixel units, read if EACH_STEP; negative goes down
    eps_ptr,  # [B] radius of the ball, in pixel units, read if EACH_EPS
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, x becomes clean
    active_ptr,  # [B] uint8, read if HAS_ACTIVE; where 0, the sample stays as it is
    step,  # the same for all samples, unless EACH_STEP
    eps,  # the same for all samples, unless EACH_EPS
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    count,  # elements of a sample
    chunks,  # programs of a sample
    channels,  # C
    channel_step,  # places from one channel to the next
    EACH_STEP: tl.constexpr,  # whether each sample has a step of its own
    EACH_EPS: tl.constexpr,  # whether each sample has a radius of its own
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    HAS_ACTIVE: tl.constexpr,  # whether some samples may be idle
    BLOCK: tl.constexpr,  # elements of a program
):
    """x_adv after a linf step, in place."""
    b, i, inside, at = places(count, chunks, BLOCK)
    if HAS_ACTIVE:
        if tl.load(active_ptr + b) == 0:
            return
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    mean, std = statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD)
    low, high = limits(mean, std, clip_low, clip_high, HAS_STD)
    clean = original(clean_ptr, at, inside, mean, std, HAS_STD)
    far = scaled(of_sample(step_ptr, step, b, EACH_STEP), std, HAS_STD)
    reach = scaled(of_sample(eps_ptr, eps, b, EACH_EPS), std, HAS_STD)
    # new = clip(x + step * sign(g), clean - eps, clean + eps), both ends clipped to valid pixels first. Reads 12 bytes
    # an element (and a mask), writes 4.
    least, most = clip(clean - reach, low, high), clip(clean + reach, low, high)
    store(x_ptr, mask_ptr, at, inside, clip(x + far * sign(g), least, most), clean, least, most, HAS_MASK, False)


@triton.jit
def linf_start(
    x_ptr,  # [B, count] x_adv, overwritten
    clean_ptr,  # [B, count] the original: floats in the space of x_adv, or uint8 pixels
    eps_ptr,  # [B] radius of the ball, in pixel units, read if EACH_EPS
    seed_ptr,  # [] int64, and the next three: where in Philox's numbers the draw lies
    offset_ptr,  # [] int64
    ids_ptr,  # [B] int64, the sample's id
    stream_ptr,  # [] int64
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, x becomes clean
    eps,  # the same for all samples, unless EACH_EPS
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    count,  # elements of a sample
    chunks,  # programs of a sample
    channels,  # C
    channel_step,  # places from one channel to the next
    columns,  # C for channels-last, read if PERMUTED
    EACH_EPS: tl.constexpr,  # whether each sample has a radius of its own
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    PERMUTED: tl.constexpr,  # whether places are in another order than elements
    BLOCK: tl.constexpr,  # elements of a program
):
    """clean plus noise uniform in the box, clipped, to x_adv."""
    b, i, inside, at = places(count, chunks, BLOCK)
    if PERMUTED:
        element = element_of(i, count, columns, PERMUTED)
        u = uniform(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element, False)
    else:  # Philox gives four words for each counter, so BLOCK / 4 of them serve a program
        block = tl.program_id(0) % chunks * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = words(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, block, False)
        u = fraction(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
    mean, std = statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD)
    low, high = limits(mean, std, clip_low, clip_high, HAS_STD)
    clean = original(clean_ptr, at, inside, mean, std, HAS_STD)
    reach = scaled(of_sample(eps_ptr, eps, b, EACH_EPS), std, HAS_STD)
    # new = clip(clean + (2u - 1) * eps), u uniform in [0, 1). Nothing but clean is read.
    least, most = clip(clean - reach, low, high), clip(clean + reach, low, high)
    new = clip(clean + (u * 2 - 1) * reach, least, most)
    store(x_ptr, mask_ptr, at, inside, new, clean, least, most, HAS_MASK, False)


@triton.jit
def ball_sums(
    x_ptr,  # [B, count] x_adv, read
    g_ptr,  # [B, count] d loss/d x_adv
    clean_ptr,  # [B, count] the original: floats in the space of x_adv, or uint8 pixels
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, x becomes clean
    sums_ptr,  # [B, chunks, 3] float64: sums of v^2, d v and d^2
    count,  # elements of a sample
    chunks,  # programs of a sample
    channels,  # C
    channel_step,  # places from one channel to the next
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    SIGN: tl.constexpr,  # whether v is the gradient's sign, else the gradient in pixel units
    BLOCK: tl.constexpr,  # elements of a program
):
    """The first pass of a step in a ball: sums of v^2, d v and d^2 over a program's BLOCK elements."""
    b, i, inside, at = places(count, chunks, BLOCK)
    mean, std = statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD)
    v = direction(g_ptr, mask_ptr, at, inside, std, HAS_STD, HAS_MASK, SIGN)
    clean = original(clean_ptr, at, inside, mean, std, HAS_STD)
    d = (tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32) - clean) * std
    d = tl.where(inside, d, 0.0)
    if HAS_MASK:
        d = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, d, 0.0)
    # A program writes its own three numbers, so that no atomics are needed and the order of additions is fixed.
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 3
    v, d = v.to(tl.float64), d.to(tl.float64)  # the square of a small or large gradient is no float32
    tl.store(out, tl.sum(v * v))
    tl.store(out + 1, tl.sum(v * d))
    tl.store(out + 2, tl.sum(d * d))


@triton.jit
def ball_step(
    x_ptr,  # [B, count] x_adv, changed in place
    g_ptr,  # [B, count] d loss/d x_adv
    clean_ptr,  # [B, count] the original: floats in the space of x_adv, or uint8 pixels
    step_ptr,  # [B] how far to go, in pixel units, read if EACH_STEP; negative goes down
    eps_ptr,  # [B] radius of the ball, in pixel units, read if EACH_EPS
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, x becomes clean
    active_ptr,  # [B] uint8, read if HAS_ACTIVE; where 0, the sample stays as it is
    sums_ptr,  # [B, chunks, 3] float64, left by `ball_sums`
    step,  # the same for all samples, unless EACH_STEP
    eps,  # the same for all samples, unless EACH_EPS
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    count,  # elements of a sample
    chunks,  # programs of a sample
    channels,  # C
    channel_step,  # places from one channel to the next
    EACH_STEP: tl.constexpr,  # whether each sample has a step of its own
    EACH_EPS: tl.constexpr,  # whether each sample has a radius of its own
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    HAS_ACTIVE: tl.constexpr,  # whether some samples may be idle
    SIGN: tl.constexpr,  # whether v is the gradient's sign, else the gradient in pixel units
    PARTS: tl.constexpr,  # partial sums that are added at a time
    BLOCK: tl.constexpr,  # elements of a program
):
    """The second pass: x_adv after a step and back into the ball, in place."""
    b, i, inside, at = places(count, chunks, BLOCK)
    if HAS_ACTIVE:
        if tl.load(active_ptr + b) == 0:
            return
    # Each program adds up all partial sums of its sample: a few kilobytes, from the second-level cache.
    v2, dv, d2 = (
        total(sums_ptr, b, chunks, 3, 0, PARTS),
        total(sums_ptr, b, chunks, 3, 1, PARTS),
        total(sums_ptr, b, chunks, 3, 2, PARTS),
    )
    scale = of_sample(step_ptr, step, b, EACH_STEP).to(tl.float64)
    if not SIGN:
        usable = (v2 > 0) & (v2 < float("inf"))  # NaN is not
        scale = tl.where(usable, scale / tl.sqrt(tl.where(usable, v2, 1.0)), 0.0)
    # |d + a v|^2 = |d|^2 + 2 a <d, v> + a^2 |v|^2 is the squared distance after the step, before it is taken.
    moved = d2 + tl.where(scale != 0, 2 * scale * dv + scale * scale * v2, 0.0)
    length = tl.sqrt(tl.maximum(moved, 0.0))
    radius = of_sample(eps_ptr, eps, b, EACH_EPS).to(tl.float64)
    shrink = tl.where(length > radius, radius / tl.where(length > radius, length, 1.0), 1.0).to(tl.float32)
    mean, std = statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD)
    low, high = limits(mean, std, clip_low, clip_high, HAS_STD)
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    clean = original(clean_ptr, at, inside, mean, std, HAS_STD)
    v = direction(g_ptr, mask_ptr, at, inside, std, HAS_STD, HAS_MASK, SIGN)
    # new = clean + (d + a v) * min(1, eps / |d + a v|)
    d = (x - clean) * std + tl.where(scale != 0, v.to(tl.float64) * scale, 0.0).to(tl.float32)
    new = clip(clean + scaled(d * shrink, std, HAS_STD), low, high)
    store(x_ptr, mask_ptr, at, inside, new, clean, clean, clean, HAS_MASK, True)


@triton.jit
def noise_sums(
    seed_ptr,  # [] int64, and the next three: where in Philox's numbers the draw lies
    offset_ptr,  # [] int64
    ids_ptr,  # [B] int64, the sample's id
    stream_ptr,  # [] int64
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, nothing is drawn
    sums_ptr,  # [B, chunks, 2] float64: squares of the noise, and how many elements are free
    count,  # elements of a sample
    chunks,  # programs of a sample
    columns,  # C for channels-last, read if PERMUTED
    HAS_MASK: tl.constexpr,  # whether there is a mask
    PERMUTED: tl.constexpr,  # whether places are in another order than elements
    BLOCK: tl.constexpr,  # elements of a program
):
    """The first pass of a start in a ball: what a direction's length follows from."""
    b, i, inside, at = places(count, chunks, BLOCK)
    free = inside
    if HAS_MASK:
        free &= tl.load(mask_ptr + at, mask=inside, other=0) != 0
    element = element_of(i, count, columns, PERMUTED)
    noise = normal(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element, count)
    square = tl.where(free, noise * noise, 0.0).to(tl.float64)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum(square))
    tl.store(out + 1, tl.sum(free.to(tl.int32)).to(tl.float64))


@triton.jit
def ball_start(
    x_ptr,  # [B, count] x_adv, overwritten
    clean_ptr,  # [B, count] the original: floats in the space of x_adv, or uint8 pixels
    eps_ptr,  # [B] radius of the ball, in pixel units, read if EACH_EPS
    seed_ptr,  # [] int64, and the next three: where in Philox's numbers the draw lies
    offset_ptr,  # [] int64
    ids_ptr,  # [B] int64, the sample's id
    stream_ptr,  # [] int64
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, count] uint8, read if HAS_MASK; where 0, x becomes clean
    sums_ptr,  # [B, chunks, 2] float64, left by `noise_sums`
    eps,  # the same for all samples, unless EACH_EPS
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    count,  # elements of a sample
    chunks,  # programs of a sample
    channels,  # C
    channel_step,  # places from one channel to the next
    columns,  # C for channels-last, read if PERMUTED
    EACH_EPS: tl.constexpr,  # whether each sample has a radius of its own
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    PERMUTED: tl.constexpr,  # whether places are in another order than elements
    PARTS: tl.constexpr,  # partial sums that are added at a time
    BLOCK: tl.constexpr,  # elements of a program
):
    """clean plus a Gaussian direction at the radius eps * u^(1/n), n the free elements, clipped, to x_adv."""
    b, i, inside, at = places(count, chunks, BLOCK)
    square, free = total(sums_ptr, b, chunks, 2, 0, PARTS), total(sums_ptr, b, chunks, 2, 1, PARTS)
    u = uniform(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, b * 0, True)
    root = tl.exp2(tl.log2(u) / tl.maximum(free, 1.0).to(tl.float32))
    radius = of_sample(eps_ptr, eps, b, EACH_EPS) * root / tl.maximum(tl.sqrt(square), 1e-12).to(tl.float32)
    element = element_of(i, count, columns, PERMUTED)
    noise = normal(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element, count)
    mean, std = statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD)
    low, high = limits(mean, std, clip_low, clip_high, HAS_STD)
    clean = original(clean_ptr, at, inside, mean, std, HAS_STD)
    new = clip(clean + scaled(noise * radius, std, HAS_STD), low, high)
    store(x_ptr, mask_ptr, at, inside, new, clean, clean, clean, HAS_MASK, True)


def refusal(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    return refused(args)


def pgd_step_(args: StepArguments) -> None:
    """As the reference: linf in one pass, l2 and sign_l2 in two."""
    if not args.x_adv.numel():
        return
    layout = Layout(args.x_adv)
    call = _Call(layout, args)
    x, grad, clean = layout.x, layout.alike(args.grad), layout.alike(args.clean)
    radii = [call.pointer(args.step_size), call.pointer(args.eps)]
    active = call.pointer(None if args.active is None else args.active.view(torch.uint8))
    numbers = (args.step_number, args.eps_number, args.clip_low, args.clip_high)
    each = {"EACH_STEP": args.step_size is not None, "EACH_EPS": args.eps is not None}
    each["HAS_ACTIVE"] = args.active is not None
    if args.norm == "linf":
        linf_step[call.grid](x, grad, clean, *radii, *call.space, active, *numbers, *call.sizes, **each, **call.flags)
    else:
        sums, is_sign = call.sums(3), args.norm == "sign_l2"
        ball_sums[call.grid](x, grad, clean, *call.space, sums, *call.sizes, SIGN=is_sign, **call.flags)
        ball_step[call.grid](
            x, grad, clean, *radii, *call.space, active, sums, *numbers, *call.sizes,
            SIGN=is_sign, PARTS=_PARTS, **each, **call.flags,
        )  # fmt: skip
    layout.finish()


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference: in linf to the bit, in l2 and sign_l2 to a few units in the last place."""
    if not args.x_adv.numel():
        return
    layout = Layout(args.x_adv, row_major=True)
    call = _Call(layout, args)
    x, clean, eps = layout.x, layout.alike(args.clean), call.pointer(args.eps)
    # The JIT would compile anew for some numbers, such as 1 and multiples of 16: once an attack, a tensor is better.
    seed, offset, stream = (
        v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.int64, device=x.device) for v in place_of(args)
    )
    draw = (seed, offset, args.sample_ids.contiguous(), stream)
    numbers = (args.eps_number, args.clip_low, args.clip_high)
    flags = call.flags | {"PERMUTED": layout.columns > 1}
    sizes, columns = call.sizes, layout.columns
    each = {"EACH_EPS": args.eps is not None}
    if args.norm == "linf":
        linf_start[call.grid](x, clean, eps, *draw, *call.space, *numbers, *sizes, columns, **each, **flags)
    else:
        sums, less = call.sums(2), {k: v for k, v in flags.items() if k != "HAS_STD"}
        noise_sums[call.grid](*draw, call.space[2], sums, *sizes[:2], columns, **less)
        ball_start[call.grid](
            x, clean, eps, *draw, *call.space, sums, *numbers, *sizes, columns, PARTS=_PARTS, **each, **flags
        )
    layout.finish()


class _Call:
    """What the launches of one call share: grid, sizes and pointers. One to nothing is one to x, which is not read."""

    def __init__(self, layout: Layout, args: StepArguments | StartArguments) -> None:
        self.x = layout.x
        chunks = triton.cdiv(layout.count, _BLOCK)
        self.grid = (len(layout.x) * chunks,)
        self.sizes = (layout.count, chunks, layout.channels, layout.channel_step)
        self.space = [self.pointer(v) for v in (args.mean, args.std, layout.mask(args.mask))]
        self.flags: dict[str, Any] = {"HAS_STD": args.std is not None, "HAS_MASK": args.mask is not None}
        self.flags |= {"BLOCK": _BLOCK, **_OPTIONS}

    def pointer(self, value: Tensor | None) -> Tensor:
        """value, or what stands for nothing."""
        return self.x if value is None else value

    def sums(self, numbers: int) -> Tensor:
        """Room for so many partial sums of each program."""
        return torch.empty((*self.grid, numbers), dtype=torch.float64, device=self.x.device)


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]]:
    """(name, kernel, signature, constants, options, arguments divisible by 16): what is compiled ahead of time.

    Each kernel as the shipped configs need it, on float32 pixels, and with all that it can do, on bfloat16.
    """
    floats = ("x_ptr", "g_ptr", "clean_ptr", "eps_ptr", "step_ptr", "mean_ptr", "std_ptr")
    kinds = dict.fromkeys(floats, "*fp32") | {"mask_ptr": "*u8", "active_ptr": "*u8", "sums_ptr": "*fp64"}
    kinds |= dict.fromkeys(("seed_ptr", "offset_ptr", "ids_ptr", "stream_ptr"), "*i64")
    kinds |= dict.fromkeys(("clip_low", "clip_high", "step", "eps"), "fp32")
    kinds |= dict.fromkeys(("channels", "channel_step", "columns", "count", "chunks"), "i32")
    heavy = kinds | {"x_ptr": "*bf16", "g_ptr": "*bf16", "clean_ptr": "*u8"}
    fixed = {"PARTS": _PARTS, "BLOCK": _BLOCK}
    cases = []
    for kernel in (linf_step, linf_start, ball_sums, ball_step, noise_sums, ball_start):
        for suffix, own, on in (("", kinds, False), ("_all", heavy, True)):
            constants = {n: fixed.get(n, on) for n in kernel.arg_names if n.isupper()}
            signature = {n: "constexpr" if n in constants else own[n] for n in kernel.arg_names}
            even = tuple(n for n in kernel.arg_names if n.endswith("_ptr") or n == "count")
            cases.append((f"{kernel.__name__}{suffix}", kernel, signature, constants, dict(_OPTIONS), even))
    return cases

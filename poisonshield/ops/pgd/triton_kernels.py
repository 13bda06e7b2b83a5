"""Triton kernels of the PGD step and random start.

linf: one pass, a program for each chunk of a channel, so that radii, mean and std are scalars of a program: 16 bytes an
element in float32. l2 and sign_l2: a first pass leaves sums of v^2, d v and d^2 (v the direction, d = x - clean) per
chunk, from which the second knows the length after the step, |d|^2 + 2 a <d, v> + a^2 |v|^2, without reading twice
more; each program adds the partial sums in the same order. Sums are float64, since squares of small gradients vanish in
float32.
The grid has one axis (CUDA's others end at 65,535). No atomics. Compiled without fused multiply-adds, so that
linf steps and starts equal the reference to the bit. A sample starts at a 64-bit offset.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.pgd.layout import expanded_mask, float32_only
from poisonshield.ops.pgd.reference import StartArguments, StepArguments

_BLOCK = 1024
_LARGEST = 2**31 - 1 - _BLOCK  # elements of a sample: places within one are 32 bits wide, samples start at 64
_PARTS = 128  # partial sums that a program adds at a time
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def pixel_scale(std_ptr, c, HAS_STD: tl.constexpr):
    """How many pixel units one unit of x_adv is in channel c: std[c], or 1."""
    if HAS_STD:
        return tl.load(std_ptr + c)
    return 1.0


@triton.jit
def original(clean_ptr, at, inside, mean_ptr, std_ptr, c, HAS_STD: tl.constexpr, BYTES: tl.constexpr):
    """clean in the space of x_adv, float32, at the offsets `at` of channel c."""
    clean = tl.load(clean_ptr + at, mask=inside, other=0).to(tl.float32)
    if BYTES:
        clean = tl.div_rn(clean, tl.full(clean.shape, 255.0, tl.float32))
        if HAS_STD:
            clean = tl.div_rn(clean - tl.load(mean_ptr + c), clean * 0 + tl.load(std_ptr + c))
    return clean


@triton.jit
def limits(mean_ptr, std_ptr, c, clip_low, clip_high, HAS_STD: tl.constexpr):
    """The clip's two ends in the space of x_adv, for channel c."""
    low, high = clip_low * 1.0, clip_high * 1.0
    if HAS_STD:
        low = tl.div_rn(low - tl.load(mean_ptr + c), tl.load(std_ptr + c))
        high = tl.div_rn(high - tl.load(mean_ptr + c), tl.load(std_ptr + c))
    return low, high


@triton.jit
def clip(v, low, high):
    """v within [low, high]; a NaN stays."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(g):
    """-1, 0 or 1 for each g; 0 for NaN."""
    return tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)


@triton.jit
def linf_step(
    x_ptr,  # [B, C, inner] x_adv, changed in place
    g_ptr,  # [B, C, inner] d loss/d x_adv
    clean_ptr,  # [B, C, inner] the original: float32 in the space of x_adv, or uint8 pixels
    step_ptr,  # [B] how far to go, in pixel units; negative goes down
    eps_ptr,  # [B] radius of the ball, in pixel units
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, C, inner] uint8, read if HAS_MASK; where 0, x becomes clean
    active_ptr,  # [B] uint8, read if HAS_ACTIVE; where 0, the sample stays as it is
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    channels,  # C; 1 where all channels are alike
    inner,  # elements of a channel
    chunks,  # programs of a channel
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    HAS_ACTIVE: tl.constexpr,  # whether some samples may be idle
    BYTES: tl.constexpr,  # whether clean is uint8
    BLOCK: tl.constexpr,  # elements of a program
):
    """x_adv after a linf step, in place; a program takes BLOCK elements of one channel of one sample."""
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    b, c = row // channels, row % channels
    if HAS_ACTIVE:
        if tl.load(active_ptr + b) == 0:
            return
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < inner
    at = row.to(tl.int64) * inner + offsets
    s = pixel_scale(std_ptr, c, HAS_STD)
    step, eps = tl.div_rn(tl.load(step_ptr + b), s * 1.0), tl.div_rn(tl.load(eps_ptr + b), s * 1.0)
    low, high = limits(mean_ptr, std_ptr, c, clip_low, clip_high, HAS_STD)
    x = tl.load(x_ptr + at, mask=inside, other=0)
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    clean = original(clean_ptr, at, inside, mean_ptr, std_ptr, c, HAS_STD, BYTES)
    # new = clip(x + step * sign(g), clean - eps, clean + eps), both ends clipped to valid pixels first. Reads 12 bytes
    # an element (and a mask), writes 4.
    new = clip(x + step * sign(g), clip(clean - eps, low, high), clip(clean + eps, low, high))
    if HAS_MASK:
        new = tl.where(tl.load(mask_ptr + at, mask=inside, other=1) != 0, new, clean)
    tl.store(x_ptr + at, new, mask=inside)


@triton.jit
def linf_start(
    x_ptr,  # [B, C, inner] x_adv, overwritten
    clean_ptr,  # [B, C, inner] the original: float32 in the space of x_adv, or uint8 pixels
    eps_ptr,  # [B] radius of the ball, in pixel units
    seed_ptr,  # [] int64, and the next three: where in Philox's numbers the draw lies
    offset_ptr,  # [] int64
    ids_ptr,  # [B] int64, the sample's id
    stream_ptr,  # [] int64
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, C, inner] uint8, read if HAS_MASK; where 0, x becomes clean
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    count,  # elements of a sample, C * inner
    inner,  # elements of a channel
    chunks,  # programs of a sample
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    BYTES: tl.constexpr,  # whether clean is uint8
    BLOCK: tl.constexpr,  # elements of a program
):
    """clean plus noise uniform in the box, clipped, to x_adv; a program takes BLOCK elements of one sample."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    # Philox gives four words for each counter, so BLOCK / 4 of them serve a program. Nothing but clean is read.
    block = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    sample = tl.load(ids_ptr + b).to(tl.uint64, bitcast=True)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True) ^ (sample >> 32)
    zero = block.to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        zero + (sample & 0xFFFFFFFF).to(tl.uint32),
        zero + (tl.load(offset_ptr) & 0xFFFFFFFF).to(tl.uint32),
        zero + (tl.load(stream_ptr) & 0xFFFFFFFF).to(tl.uint32),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    at = b.to(tl.int64) * count + offsets
    c = tl.where(inside, offsets // inner, 0)
    eps = u * 0 + tl.load(eps_ptr + b)
    low, high = u * 0 + clip_low, u * 0 + clip_high
    if HAS_STD:
        std, mean = tl.load(std_ptr + c), tl.load(mean_ptr + c)
        eps, low, high = tl.div_rn(eps, std), tl.div_rn(low - mean, std), tl.div_rn(high - mean, std)
    clean = tl.load(clean_ptr + at, mask=inside, other=0).to(tl.float32)
    if BYTES:
        clean = tl.div_rn(clean, u * 0 + 255.0)
        if HAS_STD:
            clean = tl.div_rn(clean - mean, std)
    # new = clip(clean + (2u - 1) * eps), u uniform in [0, 1)
    new = clip(clean + (u * 2 - 1) * eps, low, high)
    if HAS_MASK:
        new = tl.where(tl.load(mask_ptr + at, mask=inside, other=1) != 0, new, clean)
    tl.store(x_ptr + at, new, mask=inside)


@triton.jit
def direction(g_ptr, mask_ptr, at, inside, s, HAS_MASK: tl.constexpr, SIGN: tl.constexpr):
    """v, where to go, in pixel units: the gradient's sign or the gradient; 0 under the mask."""
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    v = sign(g) if SIGN else tl.div_rn(g, g * 0 + s)
    if HAS_MASK:
        v = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, v, 0.0)
    return v


@triton.jit
def ball_sums(
    x_ptr,  # [B, C, inner] x_adv, read
    g_ptr,  # [B, C, inner] d loss/d x_adv
    clean_ptr,  # [B, C, inner] the original: float32 in the space of x_adv, or uint8 pixels
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, C, inner] uint8, read if HAS_MASK; where 0, x becomes clean
    sums_ptr,  # [B, C, chunks, 3] float64: sums of v^2, d v and d^2
    channels,  # C; 1 where all channels are alike
    inner,  # elements of a channel
    chunks,  # programs of a channel
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    BYTES: tl.constexpr,  # whether clean is uint8
    SIGN: tl.constexpr,  # whether v is the gradient's sign, else the gradient in pixel units
    BLOCK: tl.constexpr,  # elements of a program
):
    """The first pass of a step in a ball: sums of v^2, d v and d^2 over a program's BLOCK elements."""
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    c = row % channels
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < inner
    at = row.to(tl.int64) * inner + offsets
    s = pixel_scale(std_ptr, c, HAS_STD)
    v = direction(g_ptr, mask_ptr, at, inside, s, HAS_MASK, SIGN)
    clean = original(clean_ptr, at, inside, mean_ptr, std_ptr, c, HAS_STD, BYTES)
    d = (tl.load(x_ptr + at, mask=inside, other=0) - clean) * s
    d = tl.where(inside, d, 0.0)
    if HAS_MASK:
        d = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, d, 0.0)
    # A program writes its own three numbers, so that no atomics are needed and the order of additions is fixed.
    out = sums_ptr + (row.to(tl.int64) * chunks + chunk) * 3
    v, d = v.to(tl.float64), d.to(tl.float64)  # the square of a small or large gradient is no float32
    tl.store(out, tl.sum(v * v))
    tl.store(out + 1, tl.sum(v * d))
    tl.store(out + 2, tl.sum(d * d))


@triton.jit
def ball_step(
    x_ptr,  # [B, C, inner] x_adv, changed in place
    g_ptr,  # [B, C, inner] d loss/d x_adv
    clean_ptr,  # [B, C, inner] the original: float32 in the space of x_adv, or uint8 pixels
    step_ptr,  # [B] how far to go, in pixel units; negative goes down
    eps_ptr,  # [B] radius of the ball, in pixel units
    mean_ptr,  # [C] of the normalized space, read if HAS_STD
    std_ptr,  # [C] of the normalized space, read if HAS_STD
    mask_ptr,  # [B, C, inner] uint8, read if HAS_MASK; where 0, x becomes clean
    active_ptr,  # [B] uint8, read if HAS_ACTIVE; where 0, the sample stays as it is
    sums_ptr,  # [B, C, chunks, 3] float64, left by `ball_sums`
    clip_low,  # least pixel
    clip_high,  # greatest pixel
    channels,  # C; 1 where all channels are alike
    inner,  # elements of a channel
    chunks,  # programs of a channel
    HAS_STD: tl.constexpr,  # whether x_adv is normalized
    HAS_MASK: tl.constexpr,  # whether there is a mask
    HAS_ACTIVE: tl.constexpr,  # whether some samples may be idle
    BYTES: tl.constexpr,  # whether clean is uint8
    SIGN: tl.constexpr,  # whether v is the gradient's sign, else the gradient in pixel units
    PARTS: tl.constexpr,  # partial sums that are added at a time
    BLOCK: tl.constexpr,  # elements of a program
):
    """The second pass: x_adv after a step and back into the ball, in place."""
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    b, c = row // channels, row % channels
    if HAS_ACTIVE:
        if tl.load(active_ptr + b) == 0:
            return
    # Each program adds up all partial sums of its sample: a few kilobytes, from the second-level cache.
    part = tl.arange(0, PARTS)
    vv, vd, dd = part.to(tl.float64) * 0, part.to(tl.float64) * 0, part.to(tl.float64) * 0
    for start in range(0, channels * chunks, PARTS):
        here = start + part < channels * chunks
        at = sums_ptr + (b.to(tl.int64) * channels * chunks + start + part) * 3
        vv += tl.load(at, mask=here, other=0)
        vd += tl.load(at + 1, mask=here, other=0)
        dd += tl.load(at + 2, mask=here, other=0)
    v2, dv, d2 = tl.sum(vv), tl.sum(vd), tl.sum(dd)
    scale = tl.load(step_ptr + b).to(tl.float64)
    if not SIGN:
        usable = (v2 > 0) & (v2 < float("inf"))  # NaN is not
        scale = tl.where(usable, scale / tl.sqrt(tl.where(usable, v2, 1.0)), 0.0)
    # |d + a v|^2 = |d|^2 + 2 a <d, v> + a^2 |v|^2 is the squared distance after the step, before it is taken.
    moved = d2 + tl.where(scale != 0, 2 * scale * dv + scale * scale * v2, 0.0)
    length = tl.sqrt(tl.maximum(moved, 0.0))
    eps = tl.load(eps_ptr + b).to(tl.float64)
    shrink = tl.where(length > eps, eps / tl.where(length > eps, length, 1.0), 1.0).to(tl.float32)
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < inner
    at = row.to(tl.int64) * inner + offsets
    s = pixel_scale(std_ptr, c, HAS_STD)
    low, high = limits(mean_ptr, std_ptr, c, clip_low, clip_high, HAS_STD)
    x = tl.load(x_ptr + at, mask=inside, other=0)
    clean = original(clean_ptr, at, inside, mean_ptr, std_ptr, c, HAS_STD, BYTES)
    v = direction(g_ptr, mask_ptr, at, inside, s, HAS_MASK, SIGN)
    # new = clean + (d + a v) * min(1, eps / |d + a v|)
    d = (x - clean) * s + tl.where(scale != 0, v.to(tl.float64) * scale, 0.0).to(tl.float32)
    new = clip(clean + tl.div_rn(d * shrink, d * 0 + s), low, high)
    if HAS_MASK:
        new = tl.where(tl.load(mask_ptr + at, mask=inside, other=1) != 0, new, clean)
    tl.store(x_ptr + at, new, mask=inside)


def refusal(function: str, args: StepArguments | StartArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if args.x_adv[:1].numel() > _LARGEST:
        return "a sample has 2^31 elements or more"
    return float32_only(function, args)


def pgd_step_(args: StepArguments) -> None:
    """As the reference: linf in one pass, l2 and sign_l2 in two."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    grad, clean, mask = args.grad.contiguous(), args.clean.contiguous(), expanded_mask(args.mask, x_adv)
    channels, inner = _rows(x_adv, args.std)
    chunks = triton.cdiv(inner, _BLOCK)
    rows = len(x_adv) * channels
    grid = (rows * chunks,)
    absent = args.step_size  # a pointer must point somewhere, also where nothing is read
    space = [absent if v is None else v for v in (args.mean, args.std, mask)]
    active = absent if args.active is None else args.active.to(torch.uint8)
    flags: dict[str, Any] = {"HAS_STD": args.std is not None, "HAS_MASK": mask is not None, "BLOCK": _BLOCK}
    flags |= {"BYTES": clean.dtype == torch.uint8, **_OPTIONS}
    has_active = args.active is not None
    clip, sizes = (args.clip_low, args.clip_high), (channels, inner, chunks)
    if args.norm == "linf":
        linf_step[grid](
            x_adv, grad, clean, args.step_size, args.eps, *space, active, *clip, *sizes, HAS_ACTIVE=has_active, **flags
        )
        return
    sums = torch.empty((rows * chunks, 3), dtype=torch.float64, device=x_adv.device)
    flags["SIGN"] = args.norm == "sign_l2"
    ball_sums[grid](x_adv, grad, clean, *space, sums, *sizes, **flags)
    ball_step[grid](
        x_adv, grad, clean, args.step_size, args.eps, *space, active, sums, *clip, *sizes, HAS_ACTIVE=has_active,
        PARTS=_PARTS, **flags,
    )  # fmt: skip


def pgd_random_start_(args: StartArguments) -> None:
    """As the reference, to the bit, for linf."""
    x_adv = args.x_adv
    if not x_adv.numel():
        return
    clean, mask = args.clean.contiguous(), expanded_mask(args.mask, x_adv)
    count = x_adv[0].numel()
    chunks = triton.cdiv(count, _BLOCK)
    absent = args.eps  # a pointer must point somewhere, also where nothing is read
    space = [absent if v is None else v for v in (args.mean, args.std, mask)]
    linf_start[(len(x_adv) * chunks,)](
        x_adv, clean, args.eps, args.seed, args.offset, args.sample_ids.contiguous(), args.stream, *space,
        args.clip_low, args.clip_high, count, count // x_adv.shape[1], chunks,
        HAS_STD=args.std is not None, HAS_MASK=mask is not None, BYTES=clean.dtype == torch.uint8, BLOCK=_BLOCK,
        **_OPTIONS,
    )  # fmt: skip


def _rows(x: Tensor, std: Tensor | None) -> tuple[int, int]:
    """Channels per sample, and elements per channel; a sample is one row where channels are alike."""
    if std is None:
        return 1, x[0].numel()
    return x.shape[1], x[0, 0].numel()


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]]:
    """(name, kernel, signature, constants, options, arguments divisible by 16): what is compiled ahead of time."""
    floats = ("x_ptr", "g_ptr", "eps_ptr", "step_ptr", "mean_ptr", "std_ptr")
    kinds = dict.fromkeys(floats, "*fp32") | {"clean_ptr": "*fp32", "mask_ptr": "*u8", "active_ptr": "*u8"}
    kinds |= dict.fromkeys(("seed_ptr", "offset_ptr", "ids_ptr", "stream_ptr"), "*i64")
    kinds["sums_ptr"] = "*fp64"
    kinds |= dict.fromkeys(("clip_low", "clip_high"), "fp32") | dict.fromkeys(
        ("channels", "inner", "count", "chunks"), "i32"
    )
    cases = []
    for kernel, flags in (
        (linf_step, {"HAS_STD": False, "HAS_MASK": False, "HAS_ACTIVE": False, "BYTES": False}),
        (linf_step, {"HAS_STD": True, "HAS_MASK": True, "HAS_ACTIVE": True, "BYTES": True}),
        (linf_start, {"HAS_STD": False, "HAS_MASK": False, "BYTES": False}),
        (linf_start, {"HAS_STD": True, "HAS_MASK": True, "BYTES": True}),
        (ball_sums, {"HAS_STD": False, "HAS_MASK": False, "BYTES": False, "SIGN": False}),
        (ball_sums, {"HAS_STD": True, "HAS_MASK": True, "BYTES": True, "SIGN": True}),
        (
            ball_step,
            {"HAS_STD": False, "HAS_MASK": False, "HAS_ACTIVE": False, "BYTES": False, "SIGN": False, "PARTS": _PARTS},
        ),
        (
            ball_step,
            {"HAS_STD": True, "HAS_MASK": True, "HAS_ACTIVE": True, "BYTES": True, "SIGN": True, "PARTS": _PARTS},
        ),
    ):
        constants = flags | {"BLOCK": _BLOCK}
        own = kinds | ({"clean_ptr": "*u8"} if flags["BYTES"] else {})
        signature = {n: "constexpr" if n in constants else own[n] for n in kernel.arg_names}
        even = tuple(n for n in kernel.arg_names if n.endswith("_ptr") or n in ("inner", "count"))
        name = f"{kernel.__name__}{'_all' if flags['BYTES'] else ''}"
        cases.append((name, kernel, signature, constants, dict(_OPTIONS), even))
    return cases

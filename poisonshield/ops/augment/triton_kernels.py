"""Triton kernels of a view: one for crop and mirror alone; four where colours and blur follow; one for its numbers.

A program makes BLOCK pixels of one sample's view. `crop` visits, for each, the few source pixels whose weight is not
zero: no matrices, and neighbouring programs find them in the cache. It goes on with the changes of colour that come
before contrast and leaves the sum of their luma; `finish_colours` knows the mean from these sums and does the rest.
`blur` runs twice, along rows and then down columns, and looks only as far as a sample's Gaussian reaches. What a sample
does is read from its parameters in the kernel: nothing waits for them, and shapes do not depend on them.

In between views are float32, in channels-last memory as the result. Samples start at 64-bit offsets.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.augment.reference import AugmentArguments, UniformArguments
from poisonshield.ops.augment.triton_colours import changed, luma, mixed, place_of_contrast

_BLOCK = 256
_PARTS = 128  # partial sums that a program adds at a time
_WORDS = 128  # counters of Philox a program
_LARGEST = 2**31 - 1
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def first_of(start):
    """The first source pixel of a box that begins at start, a float: rounded up, and at least 0."""
    return tl.maximum(tl.ceil(start), 0.0).to(tl.int32)


@triton.jit
def weight_of(pixel, middle, slope, begin, end):
    """The triangle's weight of source pixels at a target pixel's middle; 0 outside of begin .. end-1."""
    weight = tl.maximum(1.0 - tl.abs((pixel + 0.5) - middle) * slope, 0.0)
    return tl.where((pixel >= begin) & (pixel < end), weight, 0.0)


@triton.jit
def crop(
    out_ptr,  # [B, S, S, 3] the view, or what `finish_colours` goes on with
    sums_ptr,  # [B, chunks] float32: sums of the luma, written if COLOURS
    x_ptr,  # [B, 3, H, W] by strides: floats in [0, 1] or uint8 levels
    boxes_ptr,  # [B, 4] top, left, height, width
    flip_ptr,  # [B] uint8, read if FLIP
    factors_ptr,  # [B, 4] by change, read if COLOURS
    order_ptr,  # [B, 4] int64, read if COLOURS
    stride_b,  # of x, in elements, and the next three
    stride_c,
    stride_h,
    stride_w,
    height,  # H
    width,  # W
    grid_height,  # rows to which a whole box would be resized
    grid_width,  # and columns
    first_row,  # how many of them come before the view's
    first_column,
    side,  # S
    chunks,  # programs of a sample
    FLIP: tl.constexpr,  # whether some views are mirrored
    COLOURS: tl.constexpr,  # whether changes of colour follow
    BYTES: tl.constexpr,  # whether x is uint8
    LAST: tl.constexpr,  # whether this is the view, to be clamped
    BLOCK: tl.constexpr,  # pixels of a program
):
    """BLOCK pixels of a sample's crop: antialiased bilinear weights over the source pixels around each."""
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < side * side
    row, column = pixel // side, pixel % side
    if FLIP:
        column = tl.where(tl.load(flip_ptr + b) != 0, side - 1 - column, column)
    top, left = tl.load(boxes_ptr + 4 * b), tl.load(boxes_ptr + 4 * b + 1)
    rows, columns = tl.load(boxes_ptr + 4 * b + 2), tl.load(boxes_ptr + 4 * b + 3)
    # The steps of the reference, in its precision: of a place far from 0, rounding is felt in the weights.
    scale_y = tl.div_rn(rows, rows * 0 + grid_height)
    scale_x = tl.div_rn(columns, columns * 0 + grid_width)
    support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    slope_y, slope_x = 1.0 / support_y, 1.0 / support_x
    middle_y = top + ((row + first_row) + 0.5) * scale_y
    middle_x = left + ((column + first_column) + 0.5) * scale_x
    begin_y, begin_x = first_of(top), first_of(left)
    end_y = tl.minimum(tl.ceil(top + rows), height * 1.0).to(tl.int32)
    end_x = tl.minimum(tl.ceil(left + columns), width * 1.0).to(tl.int32)
    low_y = tl.maximum(tl.floor(middle_y - support_y - 0.5).to(tl.int32), begin_y)
    low_x = tl.maximum(tl.floor(middle_x - support_x - 0.5).to(tl.int32), begin_x)
    taps_y = tl.minimum(tl.ceil(2.0 * support_y).to(tl.int32) + 2, height)
    taps_x = tl.minimum(tl.ceil(2.0 * support_x).to(tl.int32) + 2, width)
    image = x_ptr + b * stride_b
    sum_y, sum_x = middle_y * 0, middle_y * 0
    j = taps_x * 0
    while j < taps_x:  # no `range` in these kernels: Triton 3.6 interprets it by an index that numpy 2.5 refuses
        sum_x += weight_of(low_x + j, middle_x, slope_x, begin_x, end_x)
        j += 1
    red, green, blue = middle_y * 0, middle_y * 0, middle_y * 0
    i = taps_y * 0
    while i < taps_y:
        y = low_y + i
        weight_y = weight_of(y, middle_y, slope_y, begin_y, end_y)
        sum_y += weight_y
        r, g, u = middle_y * 0, middle_y * 0, middle_y * 0
        j = taps_x * 0
        while j < taps_x:
            x = low_x + j
            weight_x = weight_of(x, middle_x, slope_x, begin_x, end_x)
            used = inside & (weight_x > 0) & (weight_y > 0)
            at = image + y * stride_h + x * stride_w
            r += weight_x * tl.load(at, mask=used, other=0).to(tl.float32)
            g += weight_x * tl.load(at + stride_c, mask=used, other=0).to(tl.float32)
            u += weight_x * tl.load(at + 2 * stride_c, mask=used, other=0).to(tl.float32)
            j += 1
        red += weight_y * r
        green += weight_y * g
        blue += weight_y * u
        i += 1
    whole = tl.where(inside, sum_y * sum_x, 1.0)
    if BYTES:
        whole = whole * 255.0
    red, green, blue = tl.div_rn(red, whole), tl.div_rn(green, whole), tl.div_rn(blue, whole)
    if COLOURS:
        last = place_of_contrast(order_ptr, b)
        for i in tl.static_range(4):
            if i < last:
                change = tl.load(order_ptr + 4 * b + i)
                factor = tl.load(factors_ptr + 4 * b + tl.minimum(change, 3))
                red, green, blue = changed(red, green, blue, change, factor, 0.0)
        tl.store(sums_ptr + b * chunks + chunk, tl.sum(tl.where(inside, luma(red, green, blue), 0.0)))
    store(out_ptr + b * side * side * 3, pixel, inside, red, green, blue, LAST)


@triton.jit
def store(view, pixel, inside, r, g, b, LAST: tl.constexpr):
    """Three channels side by side, in the dtype of the view; clamped if this is the last step."""
    if LAST:
        r, g, b = mixed(r, 0.0, 1.0), mixed(g, 0.0, 1.0), mixed(b, 0.0, 1.0)
    tl.store(view + 3 * pixel, r, mask=inside)
    tl.store(view + 3 * pixel + 1, g, mask=inside)
    tl.store(view + 3 * pixel + 2, b, mask=inside)


@triton.jit
def finish_colours(
    out_ptr,  # [B, S, S, 3] the view, or what `blur` goes on with
    from_ptr,  # [B, S, S, 3] float32, left by `crop`
    sums_ptr,  # [B, chunks] float32: sums of the luma before contrast, read if COLOURS
    factors_ptr,  # [B, 4] by change, read if COLOURS
    order_ptr,  # [B, 4] int64, read if COLOURS
    gray_ptr,  # [B] uint8, read if GRAY
    side,  # S
    chunks,  # programs of a sample
    COLOURS: tl.constexpr,  # whether colours change
    GRAY: tl.constexpr,  # whether some views become gray
    LAST: tl.constexpr,  # whether this is the view, to be clamped
    PARTS: tl.constexpr,  # partial sums that are added at a time
    BLOCK: tl.constexpr,  # pixels of a program
):
    """Contrast and the changes after it, and gray, of BLOCK pixels of one sample."""
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < side * side
    at = from_ptr + b * side * side * 3 + 3 * pixel
    red, green = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    blue = tl.load(at + 2, mask=inside, other=0)
    if COLOURS:
        # Every program adds all partial sums of its sample in the same order: a few hundred bytes from the cache.
        part = tl.arange(0, PARTS)
        sums = part.to(tl.float32) * 0
        start = chunks * 0
        while start < chunks:
            sums += tl.load(sums_ptr + b * chunks + start + part, mask=start + part < chunks, other=0)
            start += PARTS
        mean = tl.sum(sums) / (side * side)
        first = place_of_contrast(order_ptr, b)
        for i in tl.static_range(4):
            if i >= first:
                change = tl.load(order_ptr + 4 * b + i)
                factor = tl.load(factors_ptr + 4 * b + tl.minimum(change, 3))
                red, green, blue = changed(red, green, blue, change, factor, mean)
    if GRAY:
        gray = tl.load(gray_ptr + b) != 0
        light = luma(red, green, blue)
        red, green, blue = tl.where(gray, light, red), tl.where(gray, light, green), tl.where(gray, light, blue)
    store(out_ptr + b * side * side * 3, pixel, inside, red, green, blue, LAST)


@triton.jit
def blur(
    out_ptr,  # [B, S, S, 3] the view, or what the second pass goes on with
    from_ptr,  # [B, S, S, 3] float32
    sigma_ptr,  # [B] standard deviations in pixels
    side,  # S
    half,  # pixels on either side to which the Gaussian is cut, if MIRRORED
    chunks,  # programs of a sample
    DOWN: tl.constexpr,  # down the columns, else along the rows
    MIRRORED: tl.constexpr,  # at the border; else there is nothing
    LAST: tl.constexpr,  # whether this is the view, to be clamped
    BLOCK: tl.constexpr,  # pixels of a program
):
    """One direction of the Gaussian, of BLOCK pixels of one sample, renormalized over what is there."""
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < side * side
    row, column = pixel // side, pixel % side
    here = row if DOWN else column
    sigma = tl.load(sigma_ptr + b)
    # Beyond 5.9 sigma a weight is below 2^-25 of the middle one.
    far = tl.minimum(5.9 * sigma, 1e6).to(tl.int32)
    reach = tl.minimum(tl.minimum(far, half), 2 * side - 2) if MIRRORED else tl.minimum(far, side - 1)
    spread = 2.0 * tl.maximum(sigma, 1e-3) * tl.maximum(sigma, 1e-3)
    image = from_ptr + b * side * side * 3
    red, green, blue, whole = here * 0.0, here * 0.0, here * 0.0, here * 0.0
    d = -reach
    while d <= reach:
        there = here + d
        if MIRRORED:
            there = tl.where(there < 0, -there, tl.where(there >= side, 2 * side - 2 - there, there))
        found = inside & (there >= 0) & (there < side)
        weight = tl.exp(-(d * 1.0) * (d * 1.0) / spread)
        at = image + 3 * (there * side + column if DOWN else row * side + there)
        red += weight * tl.load(at, mask=found, other=0)
        green += weight * tl.load(at + 1, mask=found, other=0)
        blue += weight * tl.load(at + 2, mask=found, other=0)
        whole += tl.where(found, weight, 0.0)
        d += 1
    whole = tl.where(inside, whole, 1.0)
    red, green, blue = tl.div_rn(red, whole), tl.div_rn(green, whole), tl.div_rn(blue, whole)
    store(out_ptr + b * side * side * 3, pixel, inside, red, green, blue, LAST)


@triton.jit
def uniform(
    out_ptr,  # [B, count] float32
    ids_ptr,  # [B] int64, samples' ids
    seed_ptr,  # [] int64, and the next two: where in Philox's numbers these lie
    offset_ptr,  # [] int64
    streams_ptr,  # [B] int64
    batch,  # B
    count,  # numbers of a sample
    blocks,  # counters of a sample, of four numbers each
    WORDS: tl.constexpr,  # counters of a program
):
    """Numbers in [0, 1) of WORDS counters, which go through the samples one after the other."""
    place = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    b, block = place // blocks, place % blocks
    sample = tl.load(ids_ptr + b, mask=b < batch, other=0).to(tl.uint64, bitcast=True)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True) ^ (sample >> 32)
    zero = block.to(tl.uint32) * 0
    words = tl.philox(
        seed,
        block.to(tl.uint32),
        (sample & 0xFFFFFFFF).to(tl.uint32),
        zero + (tl.load(offset_ptr) & 0xFFFFFFFF).to(tl.uint32),
        (tl.load(streams_ptr + b, mask=b < batch, other=0) & 0xFFFFFFFF).to(tl.uint32),
    )
    for k in tl.static_range(4):
        number = (words[k] >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        tl.store(out_ptr + b * count + 4 * block + k, number, mask=(b < batch) & (4 * block + k < count))


def refusal(function: str, args: AugmentArguments | UniformArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if isinstance(args, UniformArguments):
        return None
    if torch.float64 in (args.x.dtype, args.out_dtype):
        return "float64 is computed by the reference alone"
    reach = sum((n - 1) * s for n, s in zip(args.x.shape[1:], args.x.stride()[1:], strict=True))
    if max(reach, 3 * (args.size + _BLOCK) ** 2) > _LARGEST:
        return "an image or a view has 2^31 elements or more"
    return None


def augment(args: AugmentArguments) -> Tensor:
    """As the reference, to 2e-6."""
    x, side, batch = args.x, args.size, len(args.x)
    out = torch.empty((batch, 3, side, side), dtype=args.out_dtype, device=x.device, memory_format=torch.channels_last)
    if not batch:
        return out
    chunks = triton.cdiv(side * side, _BLOCK)
    grid = (batch * chunks,)
    colours, blurred = args.factors is not None, args.sigma is not None
    steps = 1 + (colours or args.gray is not None) + 2 * blurred
    left = torch.empty((min(steps - 1, 2), *out.shape), dtype=torch.float32, device=x.device)
    targets = [*(left[i % 2] for i in range(steps - 1)), out]  # of each step
    sums = torch.empty(grid if colours else (1,), dtype=torch.float32, device=x.device)
    boxes, factors, order = _given(args.boxes.float(), args.boxes), _given(args.factors, sums), _given(args.order, sums)
    flags: dict[str, Any] = {"BLOCK": _BLOCK, **_OPTIONS}
    first = [round((n - side) / 2) for n in (args.grid_height, args.grid_width)]  # half to even
    crop[grid](
        targets[0], sums, x, boxes, _given(args.flip, sums), factors, order, *x.stride(), *x.shape[2:],
        args.grid_height, args.grid_width, *first, side, chunks, FLIP=args.flip is not None, COLOURS=colours,
        BYTES=x.dtype == torch.uint8, LAST=steps == 1, **flags,
    )  # fmt: skip
    step = 1
    if colours or args.gray is not None:
        finish_colours[grid](
            targets[1], targets[0], sums, factors, order, _given(args.gray, sums), side, chunks, COLOURS=colours,
            GRAY=args.gray is not None, LAST=not blurred, PARTS=_PARTS, **flags,
        )  # fmt: skip
        step = 2
    if blurred:
        sigma = _given(args.sigma, sums)
        for down in (False, True):
            blur[grid](
                targets[step], targets[step - 1], sigma, side, args.kernel // 2, chunks, DOWN=down,
                MIRRORED=args.kernel > 0, LAST=down, **flags,
            )  # fmt: skip
            step += 1
    return out


def keyed_uniform(args: UniformArguments) -> Tensor:
    """As the reference, to the bit."""
    ids = args.ids.contiguous()
    out = torch.empty((len(ids), args.length), dtype=torch.float32, device=ids.device)
    if out.numel():
        blocks = triton.cdiv(args.length, 4)
        uniform[(triton.cdiv(len(ids) * blocks, _WORDS),)](
            out, ids, args.seed, args.offset, args.stream.contiguous(), len(ids), args.length, blocks, WORDS=_WORDS,
            **_OPTIONS,
        )  # fmt: skip
    return out


def _given(value: Tensor | None, absent: Tensor) -> Tensor:
    """A parameter as kernels read it: float32, int64, or uint8 for bools. A pointer must point somewhere."""
    if value is None:
        return absent
    if value.dtype == torch.bool:
        return value.contiguous().view(torch.uint8)
    return (value.float() if value.is_floating_point() else value).contiguous()


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]]:
    """(name, kernel, signature, constants, options, arguments divisible by 16): what is compiled ahead of time."""
    kinds = {"out_ptr": "*fp32", "from_ptr": "*fp32", "x_ptr": "*fp32", "flip_ptr": "*u8", "gray_ptr": "*u8"}
    kinds |= dict.fromkeys(("sums_ptr", "boxes_ptr", "factors_ptr", "sigma_ptr"), "*fp32")
    kinds |= dict.fromkeys(("order_ptr", "ids_ptr", "seed_ptr", "offset_ptr", "streams_ptr"), "*i64")
    every = (
        ("crop", crop, {"FLIP": True, "COLOURS": False, "BYTES": False, "LAST": True}, {}),
        ("crop_all", crop, {"FLIP": True, "COLOURS": True, "BYTES": True, "LAST": False}, {"x_ptr": "*u8"}),
        ("finish_colours", finish_colours, {"COLOURS": True, "GRAY": True, "LAST": False, "PARTS": _PARTS}, {}),
        ("blur_rows", blur, {"DOWN": False, "MIRRORED": False, "LAST": False}, {}),
        ("blur_columns", blur, {"DOWN": True, "MIRRORED": True, "LAST": True}, {"out_ptr": "*bf16"}),
        ("uniform", uniform, {"WORDS": _WORDS}, {}),
    )
    cases = []
    for name, kernel, flags, own in every:
        numbers = [n for n in kernel.arg_names if n.islower() and not n.endswith("_ptr")]
        ones = dict.fromkeys(numbers, 1)  # Triton makes a constant of every number that is 1
        for case, given in ((name, {}), (f"{name}_of_one", ones)):
            constants = flags | ({} if kernel is uniform else {"BLOCK": _BLOCK}) | given
            signature = {n: "constexpr" if n in constants else (kinds | own).get(n, "i32") for n in kernel.arg_names}
            even = tuple(n for n in kernel.arg_names if n.endswith("_ptr"))
            cases.append((case, kernel, signature, constants, dict(_OPTIONS), even))
    return cases

"""Triton kernels of JPEG, forward and backward, smooth and exact.

A program owns a tile of 16x16 pixels: one unit of 4:2:0, or four blocks of 4:4:4. Every linear step is a product of
16x16 matrices, the smallest that Triton 3.6 multiplies: D x D' with a block-diagonal DCT transforms four blocks, A x A'
averages 2x2 and puts Cb into the upper left and Cr into the lower right of one tile, so that one transform serves both,
and 0/1 matrices fold what padding copied. Products run as three tf32 products, which keep float32's accuracy. Exact
mode splits integers into 7-bit digits, whose tf32 products are exact, and puts the results together in int32.

Forward: `code_tiles` leaves decoded planes (float32), `combine` upsamples and converts. Backward: planes again for the
clamps, then `split_gradient` (per pixel), `luma_gradient` and `gather_gradient` (per tile; as one kernel they would
spill). Memory: planes of 1.5 (4:2:0) or 3 images and, backward, a float32 image; csrc/jpeg.cu joins the passes. A NaN
spreads over its tile. No atomics.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.jpeg.exact import forward_matrix, inverse_matrix
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings, dct_matrix
from poisonshield.ops.jpeg.triton_stages import (
    averaged,
    chroma_rows,
    coded,
    colours_at,
    direct,
    emit,
    folded,
    kept,
    matrix,
    planes_of,
    row_of_taps,
    sandwich,
    table_tile,
    through_blocks,
    upstream,
)
from poisonshield.ops.record import tensors

_TILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_PIXEL_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_GATHER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # with four warps Triton 3.9 spills
_BLOCK = 512
_ROUNDINGS = {"none": 0, "poly": 1, "ste": 2, "hard": 2, "poly_ste": 3, "fourier": 4}

# Rows of the table of constant 16x16 matrices.
_DCT, _UP_LEFT, _DOWN_RIGHT, _FORWARD_HIGH, _FORWARD_LOW, _INVERSE_HIGH, _INVERSE_LOW = range(7)


@triton.jit
def code_tiles(
    x_ptr,  # [B, 3, h, w] RGB in the user's space
    q_ptr,  # [B, 2, 8, 8] quantisation tables
    affine_ptr,  # [2, 3] scale and shift from x to 0..255
    table_ptr,  # [7, 16, 16] constant matrices, `_matrices`
    y_ptr,  # [B, h, w] decoded luminance, written
    c_ptr,  # [B, 2, ch, cw] decoded chrominance, written
    h,  # height in pixels
    w,  # width in pixels
    ch,  # height of chrominance: (h + 1) // 2 or h
    cw,  # width of chrominance: (w + 1) // 2 or w
    tiles_x,  # tiles in a row of tiles
    HALF: tl.constexpr,  # 4:2:0, chrominance at half the size; else 4:4:4
    EXACT: tl.constexpr,  # libjpeg's integers; else floats
    INTEGER: tl.constexpr,  # every stored plane is rounded
    ROUNDING: tl.constexpr,  # of coefficients: a value of _ROUNDINGS
    TERMS: tl.constexpr,  # of the sawtooth's series, for fourier
):
    """Decoded planes, centred, not clamped; a program takes a tile of 16x16 pixels of one sample."""
    b = tl.program_id(1)
    ty, tx = tl.program_id(0) // tiles_x, tl.program_id(0) % tiles_x
    i = tl.arange(0, 16)
    r, col = ty * 16 + i, tx * 16 + i
    rows, columns = tl.minimum(r, h - 1), tl.minimum(col, w - 1)
    base = b.to(tl.int64) * 3 * h * w
    # decoded = D' (round(D X D' / Q) * Q) D for each block X. A tile is read once (twice in 4:2:0, whose chrominance
    # repeats other rows), stays in registers and is written once.
    y, cb, cr = planes_of(x_ptr, affine_ptr, base, rows, columns, h, w, EXACT, INTEGER)
    qy, qc = table_tile(q_ptr, b, 0), table_tile(q_ptr, b, 1)
    inside = (r[:, None] < h) & (col[None, :] < w)
    at = r[:, None].to(tl.int64) * w + col[None, :]
    y = coded(table_ptr, y, qy, EXACT, ROUNDING, TERMS)
    tl.store(y_ptr + b.to(tl.int64) * h * w + at, y, mask=inside)
    c_base = c_ptr + b.to(tl.int64) * 2 * ch * cw
    if HALF:
        _, cb, cr = planes_of(x_ptr, affine_ptr, base, chroma_rows(r, h), columns, h, w, EXACT, INTEGER)
        # Where upper left and lower right lie in the planes, and which plane that is.
        red = i >= 8
        diagonal = red[:, None] == red[None, :]
        tile = averaged(table_ptr, cb, cr, i, EXACT, INTEGER)
        tile = tl.where(diagonal, tile, 0.0)
        tile = coded(table_ptr, tile, qc, EXACT, ROUNDING, TERMS)
        rr, cc = ty * 8 + i % 8, tx * 8 + i % 8
        at = tl.where(red[:, None], ch * cw, 0) + rr[:, None] * cw + cc[None, :]
        tl.store(c_base + at, tile, mask=diagonal & (rr[:, None] < ch) & (cc[None, :] < cw))
    else:
        tl.store(c_base + at, coded(table_ptr, cb, qc, EXACT, ROUNDING, TERMS), mask=inside)
        tl.store(c_base + h * w + at, coded(table_ptr, cr, qc, EXACT, ROUNDING, TERMS), mask=inside)


@triton.jit
def combine(
    out_ptr,  # [B, 3, h, w] the result, in the space of x, written
    y_ptr,  # [B, h, w] decoded luminance, centred, not clamped
    c_ptr,  # [B, 2, ch, cw] decoded chrominance, centred, not clamped
    affine_ptr,  # [2, 3] scale and shift from x to 0..255
    h,  # height in pixels
    w,  # width in pixels
    ch,  # height of chrominance: (h + 1) // 2 or h
    cw,  # width of chrominance: (w + 1) // 2 or w
    HALF: tl.constexpr,  # 4:2:0, chrominance at half the size; else 4:4:4
    SMOOTH: tl.constexpr,  # upsampling by the triangle filter; else by copying
    EXACT: tl.constexpr,  # libjpeg's integers; else floats
    INTEGER: tl.constexpr,  # every stored plane is rounded
    BLOCK: tl.constexpr,  # pixels of a program
):
    """The decoded picture from its planes; a program takes BLOCK pixels of one sample."""
    b = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    # Reads luminance once and, for the triangle filter, four places of each chrominance plane, which neighbours share.
    red, green, blue = colours_at(y_ptr, c_ptr, b, pixel, inside, h, w, ch, cw, HALF, SMOOTH, EXACT, INTEGER)
    at = b.to(tl.int64) * 3 * h * w + pixel
    emit(out_ptr, affine_ptr, at, inside, red, 0, INTEGER)
    emit(out_ptr, affine_ptr, at + h * w, inside, green, 1, INTEGER)
    emit(out_ptr, affine_ptr, at + 2 * h * w, inside, blue, 2, INTEGER)


@triton.jit
def split_gradient(
    out_ptr,  # [B, 3, h, w] float32, d loss/d (Y, Cb, Cr), written
    g_ptr,  # [B, 3, h, w] d loss/d output
    y_ptr,  # [B, h, w] decoded luminance, centred, not clamped
    c_ptr,  # [B, 2, ch, cw] decoded chrominance, centred, not clamped
    affine_ptr,  # [2, 3] scale and shift from x to 0..255
    clamp_grad,  # slope where a clamp cuts
    h,  # height in pixels
    w,  # width in pixels
    ch,  # height of chrominance: (h + 1) // 2 or h
    cw,  # width of chrominance: (w + 1) // 2 or w
    HALF: tl.constexpr,  # 4:2:0, chrominance at half the size; else 4:4:4
    SMOOTH: tl.constexpr,  # upsampling by the triangle filter; else by copying
    INTEGER: tl.constexpr,  # every stored plane is rounded
    BLOCK: tl.constexpr,  # pixels of a program
):
    """d loss/d (Y, Cb, Cr) of each pixel: the last clamp and the colour transform, transposed."""
    b = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    red, green, blue = colours_at(y_ptr, c_ptr, b, pixel, inside, h, w, ch, cw, HALF, SMOOTH, False, INTEGER)
    at = b.to(tl.int64) * 3 * h * w + pixel
    # d/dY = gr + gg + gb; d/dCb and d/dCr weigh them as the colours use them: the transposed matrix.
    gr = upstream(g_ptr, affine_ptr, at, inside, red, clamp_grad, 0)
    gg = upstream(g_ptr, affine_ptr, at + h * w, inside, green, clamp_grad, 1)
    gb = upstream(g_ptr, affine_ptr, at + 2 * h * w, inside, blue, clamp_grad, 2)
    tl.store(out_ptr + at, gr + gg + gb, mask=inside)
    tl.store(out_ptr + at + h * w, 1.772 * gb - 0.34413628620102216 * gg, mask=inside)
    tl.store(out_ptr + at + 2 * h * w, 1.402 * gr - 0.7141362862010221 * gg, mask=inside)


@triton.jit
def luma_gradient(
    x_ptr,  # [B, 3, h, w] RGB in the user's space
    q_ptr,  # [B, 2, 8, 8] quantisation tables
    affine_ptr,  # [2, 3] scale and shift from x to 0..255
    table_ptr,  # [7, 16, 16] constant matrices, `_matrices`
    g_ptr,  # [B, 3, h, w] d loss/d (Y, Cb, Cr), from `split_gradient`; the first plane is changed
    y_ptr,  # [B, h, w] decoded luminance, centred, not clamped
    clamp_grad,  # slope where a clamp cuts
    h,  # height in pixels
    w,  # width in pixels
    tiles_x,  # tiles in a row of tiles
    INTEGER: tl.constexpr,  # every stored plane is rounded
    ROUNDING: tl.constexpr,  # of coefficients: a value of _ROUNDINGS
    TERMS: tl.constexpr,  # of the sawtooth's series, for fourier
):
    """In place of the gradient for the decoded luminance, g[:, 0], that for the luminance of x."""
    b = tl.program_id(1)
    ty, tx = tl.program_id(0) // tiles_x, tl.program_id(0) % tiles_x
    i = tl.arange(0, 16)
    r, col = ty * 16 + i, tx * 16 + i
    rows, columns = tl.minimum(r, h - 1), tl.minimum(col, w - 1)
    base = b.to(tl.int64) * 3 * h * w
    y, _, _ = planes_of(x_ptr, affine_ptr, base, rows, columns, h, w, False, INTEGER)
    inside = (r[:, None] < h) & (col[None, :] < w)
    at = r[:, None] * w + col[None, :]
    g = direct(g_ptr + base, y_ptr + b.to(tl.int64) * h * w, at, inside, clamp_grad)
    # dX = D' (D g D' * slope(u)) D, u = D X D' / Q: Q and 1 / Q cancel. The tile is computed again from x, not stored.
    dy = through_blocks(table_ptr, y, table_tile(q_ptr, b, 0), g, ROUNDING, TERMS)
    tl.store(g_ptr + base + at, folded(dy, rows, columns, r, col), mask=inside)


@triton.jit
def gather_gradient(
    dx_ptr,  # [B, 3, h, w] d loss/d x, written
    x_ptr,  # [B, 3, h, w] RGB in the user's space
    q_ptr,  # [B, 2, 8, 8] quantisation tables
    affine_ptr,  # [2, 3] scale and shift from x to 0..255
    table_ptr,  # [7, 16, 16] constant matrices, `_matrices`
    g_ptr,  # [B, 3, h, w] d loss/d luminance of x, and d loss/d upsampled (Cb, Cr)
    c_ptr,  # [B, 2, ch, cw] decoded chrominance, centred, not clamped
    clamp_grad,  # slope where a clamp cuts
    h,  # height in pixels
    w,  # width in pixels
    ch,  # height of chrominance: (h + 1) // 2 or h
    cw,  # width of chrominance: (w + 1) // 2 or w
    tiles_x,  # tiles in a row of tiles
    HALF: tl.constexpr,  # 4:2:0, chrominance at half the size; else 4:4:4
    SMOOTH: tl.constexpr,  # upsampling by the triangle filter; else by copying
    INTEGER: tl.constexpr,  # every stored plane is rounded
    ROUNDING: tl.constexpr,  # of coefficients: a value of _ROUNDINGS
    TERMS: tl.constexpr,  # of the sawtooth's series, for fourier
):
    """d loss/d x: chrominance's way back through the blocks, joined with what `luma_gradient` left."""
    b = tl.program_id(1)
    ty, tx = tl.program_id(0) // tiles_x, tl.program_id(0) % tiles_x
    i = tl.arange(0, 16)
    r, col = ty * 16 + i, tx * 16 + i
    rows, columns = tl.minimum(r, h - 1), tl.minimum(col, w - 1)
    base = b.to(tl.int64) * 3 * h * w
    qc = table_tile(q_ptr, b, 1)
    inside = (r[:, None] < h) & (col[None, :] < w)
    at = r[:, None] * w + col[None, :]
    c_base = c_ptr + b.to(tl.int64) * 2 * ch * cw
    # dX of chrominance as in `luma_gradient`, between the adjoints of upsampling (before) and averaging (after).
    if HALF:
        from_rows = chroma_rows(r, h)
        _, cb, cr = planes_of(x_ptr, affine_ptr, base, from_rows, columns, h, w, False, INTEGER)
        red = i >= 8
        diagonal = red[:, None] == red[None, :]
        rr, cc = (ty * 8 + i % 8)[:, None], (tx * 8 + i % 8)[None, :]
        valid = diagonal & (rr < ch) & (cc < cw)
        source = g_ptr + base + tl.where(red[:, None], 2 * h * w, h * w)
        g = row_of_taps(source, 2 * rr, cc, valid, h, w, cw, SMOOTH)
        g += row_of_taps(source, 2 * rr + 1, cc, valid, h, w, cw, SMOOTH)
        if SMOOTH:
            far = row_of_taps(source, tl.maximum(2 * rr - 1, 0), cc, valid, h, w, cw, True)
            far += row_of_taps(source, tl.minimum(2 * rr + 2, 2 * ch - 1), cc, valid, h, w, cw, True)
            g = 0.75 * g + 0.25 * far
        value = tl.load(c_base + tl.where(red[:, None], ch * cw, 0) + rr * cw + cc, mask=valid, other=0)
        g = tl.where(valid, g * kept(value, -128.0, 127.0, clamp_grad), 0.0)
        tile = averaged(table_ptr, cb, cr, i, False, INTEGER)
        tile = tl.where(diagonal, through_blocks(table_ptr, tile, qc, g, ROUNDING, TERMS), 0.0)
        up, down = matrix(table_ptr, 1), matrix(table_ptr, 2)
        dcb = folded(sandwich(tl.trans(up), tile), from_rows, columns, r, col)
        dcr = folded(sandwich(tl.trans(down), tile), from_rows, columns, r, col)
    else:
        _, cb, cr = planes_of(x_ptr, affine_ptr, base, rows, columns, h, w, False, INTEGER)
        g = direct(g_ptr + base + h * w, c_base, at, inside, clamp_grad)
        dcb = folded(through_blocks(table_ptr, cb, qc, g, ROUNDING, TERMS), rows, columns, r, col)
        g = direct(g_ptr + base + 2 * h * w, c_base + h * w, at, inside, clamp_grad)
        dcr = folded(through_blocks(table_ptr, cr, qc, g, ROUNDING, TERMS), rows, columns, r, col)
    dy = tl.load(g_ptr + base + at, mask=inside, other=0)
    # dx = affine scale * M' (dY, dCb, dCr), M the matrix from RGB to YCbCr. Three reads of g, three writes of dx.
    dr = (0.299 * dy - 0.16873589164785552 * dcb + 0.5 * dcr) * tl.load(affine_ptr)
    dg = (0.587 * dy - 0.3312641083521445 * dcb - 0.4186875891583452 * dcr) * tl.load(affine_ptr + 1)
    db = (0.114 * dy + 0.5 * dcb - 0.08131241084165478 * dcr) * tl.load(affine_ptr + 2)
    tl.store(dx_ptr + base + at, dr, mask=inside)
    tl.store(dx_ptr + base + h * w + at, dg, mask=inside)
    tl.store(dx_ptr + base + 2 * h * w + at, db, mask=inside)


@cache
def _matrices(device: torch.device) -> Tensor:
    """The constant matrices, [7, 16, 16] float32; digits of the integer transforms are 7 bits wide."""
    out = torch.zeros(7, 16, 16)
    for half in (slice(0, 8), slice(8, 16)):
        out[_DCT, half, half] = dct_matrix(torch.float32, torch.device("cpu"))
        for high, low, m in (
            (_FORWARD_HIGH, _FORWARD_LOW, forward_matrix()),
            (_INVERSE_HIGH, _INVERSE_LOW, inverse_matrix()),
        ):
            out[high, half, half], out[low, half, half] = (m >> 7).float(), (m & 127).float()
    for i in range(8):
        out[_UP_LEFT, i, 2 * i : 2 * i + 2] = out[_DOWN_RIGHT, 8 + i, 2 * i : 2 * i + 2] = 0.5
    return out.to(device)


def refusal(function: str, args: JpegArguments | JpegGradientArguments) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if len(args.x) > 65535:
        return "a batch of over 65,535 samples exceeds the grid"
    if any(v.dtype == torch.float64 for v in tensors(args)):
        return "float64 is for the reference"
    if isinstance(args, JpegGradientArguments):
        return "gradients of tables are the reference's alone" if args.table_grad else None
    return "float64 is for the reference" if args.out_dtype == torch.float64 else None


class _Launch:
    """Sizes, flags and grids that all kernels of a call share."""

    def __init__(self, x: Tensor, settings: JpegSettings) -> None:
        self.settings = settings
        self.h, self.w = x.shape[-2:]
        self.half = settings.subsampling == "420"
        self.ch, self.cw = ((self.h + 1) // 2, (self.w + 1) // 2) if self.half else (self.h, self.w)
        self.smooth = settings.upsample == "fancy" and self.cw > 2
        self.tiles_x = triton.cdiv(self.w, 16)
        self.tiles = (triton.cdiv(self.h, 16) * self.tiles_x, len(x))
        self.pixels = (triton.cdiv(self.h * self.w, _BLOCK), len(x))

    def rounding(self) -> dict[str, Any]:
        """The flags of kernels that round coefficients."""
        s = self.settings
        terms = s.fourier_terms if s.rounding == "fourier" else 1
        return {"INTEGER": s.integer_planes, "ROUNDING": _ROUNDINGS[s.rounding], "TERMS": terms}

    def planes(self, x: Tensor, tables: Tensor, affine: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Decoded planes, centred, not clamped: [B, h, w] and [B, 2, ch, cw]."""
        y = torch.empty((len(x), self.h, self.w), device=x.device)
        c = torch.empty((len(x), 2, self.ch, self.cw), device=x.device)
        code_tiles[self.tiles](
            x, tables, affine, _matrices(x.device), y, c, self.h, self.w, self.ch, self.cw, self.tiles_x,
            HALF=self.half, EXACT=exact, **self.rounding(), **_TILE_OPTIONS,
        )  # fmt: skip
        return y, c


def jpeg(args: JpegArguments) -> Tensor:
    """As the reference: exact mode to the bit, smooth mode to float32's accuracy."""
    out = torch.empty(args.x.shape, dtype=args.out_dtype, device=args.x.device)
    if args.x.numel():
        x, tables, affine = args.x.contiguous(), args.tables.contiguous(), args.affine.contiguous()
        s, exact = _Launch(x, args.settings), args.mode == "exact"
        y, c = s.planes(x, tables, affine, exact)
        combine[s.pixels](
            out, y, c, affine, s.h, s.w, s.ch, s.cw,
            HALF=s.half, SMOOTH=s.smooth, EXACT=exact, INTEGER=args.settings.integer_planes, BLOCK=_BLOCK,
            **_PIXEL_OPTIONS,
        )  # fmt: skip
    return torch.empty_like(args.x, dtype=args.out_dtype).copy_(out)


def jpeg_backward(args: JpegGradientArguments) -> tuple[Tensor, Tensor]:
    """As the reference, for x alone."""
    dx = torch.empty(args.x.shape, dtype=args.x.dtype, device=args.x.device)
    if args.x.numel():
        x, tables, affine = args.x.contiguous(), args.tables.contiguous(), args.affine.contiguous()
        s, clamp_grad, matrices = _Launch(x, args.settings), args.settings.clamp_grad, _matrices(x.device)
        y, c = s.planes(x, tables, affine, False)
        g = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        split_gradient[s.pixels](
            g, args.grad.contiguous(), y, c, affine, clamp_grad, s.h, s.w, s.ch, s.cw,
            HALF=s.half, SMOOTH=s.smooth, INTEGER=args.settings.integer_planes, BLOCK=_BLOCK, **_PIXEL_OPTIONS,
        )  # fmt: skip
        luma_gradient[s.tiles](
            x, tables, affine, matrices, g, y, clamp_grad, s.h, s.w, s.tiles_x, **s.rounding(), **_TILE_OPTIONS
        )
        gather_gradient[s.tiles](
            dx, x, tables, affine, matrices, g, c, clamp_grad, s.h, s.w, s.ch, s.cw, s.tiles_x,
            HALF=s.half, SMOOTH=s.smooth, **s.rounding(), **_GATHER_OPTIONS,
        )  # fmt: skip
    return torch.empty_like(args.x).copy_(dx), args.tables.new_empty(0)


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], tuple[str, ...]]]:
    """(name, kernel, signature, constants, options, arguments divisible by 16): what is compiled ahead of time."""
    pointers = ("x_ptr", "q_ptr", "affine_ptr", "table_ptr", "y_ptr", "c_ptr", "out_ptr", "g_ptr", "dx_ptr")
    kinds = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("h", "w", "ch", "cw", "tiles_x"), "i32")
    kinds["clamp_grad"] = "fp32"
    forms = {
        "420": {"HALF": True, "SMOOTH": True},
        "420_box": {"HALF": True, "SMOOTH": False},
        "444": {"HALF": False, "SMOOTH": False},
    }
    poly = {"EXACT": False, "INTEGER": False, "ROUNDING": 1, "TERMS": 1}
    fourier = poly | {"INTEGER": True, "ROUNDING": 4, "TERMS": 10}
    backward = (split_gradient, luma_gradient, gather_gradient)
    wanted = [(f, "poly", poly, (code_tiles, combine, *backward)) for f in forms]
    wanted += [(f, "exact", poly | {"EXACT": True}, (code_tiles, combine)) for f in ("420", "444")]
    for kind in ("fourier", "fourier_bf16"):
        wanted += [(f, kind, fourier, (code_tiles, luma_gradient, gather_gradient)) for f in ("420", "444")]
    cases = []
    for form, kind, flags, kernels in wanted:
        for kernel in kernels:
            constants = forms[form] | flags | {"BLOCK": _BLOCK}
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            halves = {"x_ptr": "*bf16", "dx_ptr": "*bf16"} if kind.endswith("bf16") else {}
            signature = {n: "constexpr" if n in constants else (kinds | halves)[n] for n in kernel.arg_names}
            even = tuple(n for n in kernel.arg_names if n.endswith("_ptr") or n in ("h", "w"))
            options = dict(_GATHER_OPTIONS if kernel is gather_gradient else _TILE_OPTIONS)
            cases.append((f"{kernel.__name__}_{form}_{kind}", kernel, signature, constants, options, even))
    return cases

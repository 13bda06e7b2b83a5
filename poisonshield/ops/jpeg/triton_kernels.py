"""Triton kernels of JPEG, forward and backward, smooth and exact.

A program owns a tile of 16x16 pixels: one unit of 4:2:0, or four blocks of 4:4:4. Every linear step is a product of
16x16 matrices, the smallest that Triton 3.6 multiplies: D x D' with a block-diagonal DCT transforms four blocks, A x A'
averages 2x2 and puts Cb into the upper left and Cr into the lower right of one tile, so that one transform serves both,
and 0/1 matrices fold what padding copied. Products run as three tf32 products, which keep float32's accuracy. Exact
mode splits integers into 7-bit digits, whose tf32 products are exact, and puts the results together in int32.

Forward: `code_tiles` leaves decoded planes (float32), `combine` upsamples and converts. Backward: planes again for the
clamps, then `split_gradient` (per pixel), `luma_gradient` and `gather_gradient` (per tile; as one kernel they would
spill). Memory: planes of 1.5 (4:2:0) or 3 images and, backward, a float32 image; joining the passes is for a later CUDA
kernel. A NaN spreads over its tile. No atomics.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poisonshield.ops.jpeg.exact import forward_matrix, inverse_matrix
from poisonshield.ops.jpeg.reference import JpegArguments, JpegGradientArguments, JpegSettings, dct_matrix
from poisonshield.ops.record import tensors
from poisonshield.ops.trigonometry import cosine_of_turns

_TILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_PIXEL_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_GATHER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # with four warps Triton 3.9 spills
_BLOCK = 512
_ROUNDINGS = {"none": 0, "poly": 1, "ste": 2, "hard": 2, "poly_ste": 3, "fourier": 4}

# Rows of the table of constant 16x16 matrices.
_DCT, _UP_LEFT, _DOWN_RIGHT, _FORWARD_HIGH, _FORWARD_LOW, _INVERSE_HIGH, _INVERSE_LOW = range(7)


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def sandwich(m, x):
    """m @ x @ m.T"""
    return product(m, product(x, tl.trans(m)))


@triton.jit
def matrix(table_ptr, k: tl.constexpr):
    i = tl.arange(0, 16)
    return tl.load(table_ptr + k * 256 + i[:, None] * 16 + i[None, :])


@triton.jit
def whole(v, INTEGER: tl.constexpr):
    return tl.floor(v + 0.5) if INTEGER else v


@triton.jit
def nearest(u):
    n = tl.floor(tl.abs(u) + 0.5)
    return tl.where(u < 0, -n, n)


@triton.jit
def rounded(u, ROUNDING: tl.constexpr, TERMS: tl.constexpr):
    n = nearest(u)
    if ROUNDING == 0:
        n = u
    if ROUNDING == 1:
        e = u - n
        n = n + e * e * e
    if ROUNDING == 4:
        n = u
        for k in range(1, TERMS + 1):  # not unrolled, as in `slope`
            turns = k * u - tl.floor(k * u)
            n += (2 * (k % 2) - 1) * (-1.0 / (k * 3.141592653589793)) * cosine_of_turns(turns, 3)
    return n


@triton.jit
def slope(u, ROUNDING: tl.constexpr, TERMS: tl.constexpr):
    e = u - nearest(u)
    s = 3 * e * e
    if ROUNDING == 0 or ROUNDING == 2:
        s = u * 0 + 1.0
    if ROUNDING == 4:
        s = u * 0 + 1.0
        for k in range(1, TERMS + 1):  # not unrolled: the terms together would spill
            turns = k * u - tl.floor(k * u)
            s -= (2 * (k % 2) - 1) * 2.0 * cosine_of_turns(turns, 0)
    return s


@triton.jit
def clamped(v, low, high):
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kept(v, low, high, clamp_grad):
    """The slope of a clamp at v."""
    return tl.where((v >= low) & (v <= high), 1.0, clamp_grad)


@triton.jit
def chroma_rows(r, h):
    """Where 4:2:0 chrominance reads row r: copied to an even count only, then the last *pair* is repeated."""
    even = h + h % 2
    return tl.minimum(tl.where(r >= even, even - 2 + r % 2, r), h - 1)


@triton.jit
def channel(x_ptr, affine_ptr, at, inside, c: tl.constexpr, EXACT: tl.constexpr):
    """0..255: float as it is, or, for exact mode, whole numbers rounded half up."""
    v = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    v = v * tl.load(affine_ptr + c) + tl.load(affine_ptr + 3 + c)
    if EXACT:
        v = tl.floor(v + 0.5)
        v = tl.where(v != v, 0.0, tl.minimum(tl.maximum(v, 0.0), 255.0))
    return v


@triton.jit
def planes_of(x_ptr, affine_ptr, base, rows, columns, h, w, EXACT: tl.constexpr, INTEGER: tl.constexpr):
    """Y, Cb, Cr of a tile, centred on 0. rows, columns: where to read. Exact mode computes in int32."""
    area = h.to(tl.int64) * w
    at = base + rows[:, None].to(tl.int64) * w + columns[None, :]
    all_ = (rows[:, None] >= 0) & (columns[None, :] >= 0)
    r = channel(x_ptr, affine_ptr, at, all_, 0, EXACT)
    g = channel(x_ptr, affine_ptr, at + area, all_, 1, EXACT)
    b = channel(x_ptr, affine_ptr, at + 2 * area, all_, 2, EXACT)
    if EXACT:
        ri, gi, bi = r.to(tl.int32), g.to(tl.int32), b.to(tl.int32)
        y = ((19595 * ri + 38470 * gi + 7471 * bi + 32768) >> 16).to(tl.float32) - 128
        cb = ((-11059 * ri - 21709 * gi + 32768 * bi + 8421375) >> 16).to(tl.float32) - 128
        cr = ((32768 * ri - 27439 * gi - 5329 * bi + 8421375) >> 16).to(tl.float32) - 128
    else:
        y = whole(0.299 * r + 0.587 * g + 0.114 * b - 128, INTEGER)
        cb = whole(-0.16873589164785552 * r - 0.3312641083521445 * g + 0.5 * b, INTEGER)
        cr = whole(0.5 * r - 0.4186875891583452 * g - 0.08131241084165478 * b, INTEGER)
    return y, cb, cr


@triton.jit
def exact_product(high, low, x):
    """(high * 128 + low) @ x for an int32 x below 2^18: digits of 7 and 11 bits, which tf32 holds, sums below 2^24."""
    top, rest = (x >> 7).to(tl.float32), (x & 127).to(tl.float32)
    hh = tl.dot(high, top, input_precision="tf32").to(tl.int32)
    hl = tl.dot(high, rest, input_precision="tf32").to(tl.int32)
    lh = tl.dot(low, top, input_precision="tf32").to(tl.int32)
    ll = tl.dot(low, rest, input_precision="tf32").to(tl.int32)
    return hh * 16384 + (hl + lh) * 128 + ll


@triton.jit
def exact_coded(table_ptr, x, q):
    """A tile of four blocks through the integer transform, the tables and back, before 128 is added. int32."""
    fh, fl = matrix(table_ptr, 3), matrix(table_ptr, 4)
    c = (tl.trans(exact_product(fh, fl, tl.trans(x))) + 1024) >> 11  # along rows
    c = (exact_product(fh, fl, c) + 16384) >> 15  # along columns
    qi = q.to(tl.int32)
    size = (tl.abs(c) + 4 * qi) // (8 * qi)
    c = tl.where(c < 0, -size, size) * qi
    ih, il = matrix(table_ptr, 5), matrix(table_ptr, 6)
    c = (exact_product(ih, il, c) + 1024) >> 11
    return (tl.trans(exact_product(ih, il, tl.trans(c))) + 131072) >> 18


@triton.jit
def coded(
    table_ptr, x, q, EXACT: tl.constexpr, ROUNDING: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    """A tile of four blocks, transformed, rounded and transformed back: centred on 0, not clamped."""
    if EXACT:
        return exact_coded(table_ptr, x.to(tl.int32), q).to(tl.float32)
    d = matrix(table_ptr, 0)
    u = sandwich(d, x) * tl.div_rn(q * 0 + 1.0, q)
    return sandwich(tl.trans(d), rounded(u, ROUNDING, TERMS) * q)


@triton.jit
def averaged(table_ptr, cb, cr, column, EXACT: tl.constexpr, INTEGER: tl.constexpr):
    """2x2 means, Cb in the upper left and Cr in the lower right of one tile, 0 elsewhere."""
    up, down = matrix(table_ptr, 1), matrix(table_ptr, 2)
    if EXACT:
        total = sandwich(up, cb + 128) + sandwich(down, cr + 128)  # means of whole numbers: quarters, exact
        bias = 1 + (column % 2)
        quarters = (total * 4 + 0.5).to(tl.int32)
        return ((quarters + bias[None, :]) >> 2).to(tl.float32) - 128
    return whole(sandwich(up, cb) + sandwich(down, cr), INTEGER)


@triton.jit
def table_tile(q_ptr, b, which: tl.constexpr):
    i = tl.arange(0, 16)
    return tl.load(q_ptr + b * 128 + which * 64 + (i[:, None] % 8) * 8 + i[None, :] % 8)


@triton.jit
def code_tiles(
    x_ptr, q_ptr, affine_ptr, table_ptr, y_ptr, c_ptr, h, w, ch, cw, tiles_x,
    HALF: tl.constexpr, EXACT: tl.constexpr, INTEGER: tl.constexpr, ROUNDING: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Decoded planes, centred, not clamped: y [B, h, w] and c [B, 2, ch, cw]."""
    b = tl.program_id(1)
    ty, tx = tl.program_id(0) // tiles_x, tl.program_id(0) % tiles_x
    i = tl.arange(0, 16)
    r, col = ty * 16 + i, tx * 16 + i
    rows, columns = tl.minimum(r, h - 1), tl.minimum(col, w - 1)
    base = b.to(tl.int64) * 3 * h * w
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
def chroma_at(c_ptr, i, j, inside, ch, cw, HALF: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr):
    """One chrominance plane at pixel (i, j), centred."""
    if HALF:
        near_i, near_j = i // 2, j // 2
        v = clamped(tl.load(c_ptr + near_i * cw + near_j, mask=inside, other=0), -128.0, 127.0)
        if SMOOTH:
            far_i = tl.minimum(tl.maximum(near_i + 2 * (i % 2) - 1, 0), ch - 1)
            far_j = tl.minimum(tl.maximum(near_j + 2 * (j % 2) - 1, 0), cw - 1)
            below = clamped(tl.load(c_ptr + far_i * cw + near_j, mask=inside, other=0), -128.0, 127.0)
            beside = clamped(tl.load(c_ptr + near_i * cw + far_j, mask=inside, other=0), -128.0, 127.0)
            corner = clamped(tl.load(c_ptr + far_i * cw + far_j, mask=inside, other=0), -128.0, 127.0)
            v = 3 * (3 * v + below) + (3 * beside + corner)
            if EXACT:
                v = ((v.to(tl.int32) + 2048 + 8 - j % 2) >> 4).to(tl.float32) - 128
            else:
                v = v * 0.0625
        return v
    return clamped(tl.load(c_ptr + i * cw + j, mask=inside, other=0), -128.0, 127.0)


@triton.jit
def colours_at(
    y_ptr, c_ptr, b, pixel, inside, h, w, ch, cw,
    HALF: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """R, G, B in 0..255 before they are clamped."""
    i, j = pixel // w, pixel % w
    y = clamped(tl.load(y_ptr + b.to(tl.int64) * h * w + pixel, mask=inside, other=0), -128.0, 127.0)
    c_base = c_ptr + b.to(tl.int64) * 2 * ch * cw
    if INTEGER:  # planes are stored rounded; upsampling rounds again
        y = whole(y, True)
    cb = chroma_at_whole(c_base, i, j, inside, ch, cw, HALF, SMOOTH, EXACT, INTEGER)
    cr = chroma_at_whole(c_base + ch * cw, i, j, inside, ch, cw, HALF, SMOOTH, EXACT, INTEGER)
    y = y + 128
    if EXACT:
        bi, ri, yi = cb.to(tl.int32), cr.to(tl.int32), y.to(tl.int32)
        red = (yi + ((91881 * ri + 32768) >> 16)).to(tl.float32)
        green = (yi + ((-22554 * bi - 46802 * ri + 32768) >> 16)).to(tl.float32)
        blue = (yi + ((116130 * bi + 32768) >> 16)).to(tl.float32)
    else:
        red = y + 1.402 * cr
        green = y - 0.34413628620102216 * cb - 0.7141362862010221 * cr
        blue = y + 1.772 * cb
    return red, green, blue


@triton.jit
def chroma_at_whole(
    c_ptr, i, j, inside, ch, cw, HALF: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, INTEGER: tl.constexpr
):  # fmt: skip
    if INTEGER and not EXACT:
        return whole(chroma_at_rounded(c_ptr, i, j, inside, ch, cw, HALF, SMOOTH), HALF)
    return chroma_at(c_ptr, i, j, inside, ch, cw, HALF, SMOOTH, EXACT)


@triton.jit
def stored(c_ptr, at, inside):
    return whole(clamped(tl.load(c_ptr + at, mask=inside, other=0), -128.0, 127.0), True)


@triton.jit
def chroma_at_rounded(c_ptr, i, j, inside, ch, cw, HALF: tl.constexpr, SMOOTH: tl.constexpr):
    """`chroma_at` where the stored plane is rounded to whole numbers first."""
    if not HALF:
        return stored(c_ptr, i * cw + j, inside)
    near_i, near_j = i // 2, j // 2
    v = stored(c_ptr, near_i * cw + near_j, inside)
    if SMOOTH:
        far_i = tl.minimum(tl.maximum(near_i + 2 * (i % 2) - 1, 0), ch - 1)
        far_j = tl.minimum(tl.maximum(near_j + 2 * (j % 2) - 1, 0), cw - 1)
        v = 9 * v + 3 * stored(c_ptr, far_i * cw + near_j, inside) + 3 * stored(c_ptr, near_i * cw + far_j, inside)
        v = (v + stored(c_ptr, far_i * cw + far_j, inside)) * 0.0625
    return v


@triton.jit
def emit(out_ptr, affine_ptr, at, inside, v, c: tl.constexpr, INTEGER: tl.constexpr):
    v = whole(clamped(v, 0.0, 255.0), INTEGER)
    shift, scale = tl.load(affine_ptr + 3 + c), tl.load(affine_ptr + c)
    tl.store(out_ptr + at, tl.div_rn(v - shift, v * 0 + scale), mask=inside)


@triton.jit
def combine(
    out_ptr, y_ptr, c_ptr, affine_ptr, h, w, ch, cw,
    HALF: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    red, green, blue = colours_at(y_ptr, c_ptr, b, pixel, inside, h, w, ch, cw, HALF, SMOOTH, EXACT, INTEGER)
    at = b.to(tl.int64) * 3 * h * w + pixel
    emit(out_ptr, affine_ptr, at, inside, red, 0, INTEGER)
    emit(out_ptr, affine_ptr, at + h * w, inside, green, 1, INTEGER)
    emit(out_ptr, affine_ptr, at + 2 * h * w, inside, blue, 2, INTEGER)


@triton.jit
def upstream(g_ptr, affine_ptr, at, inside, value, clamp_grad, c: tl.constexpr):
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    return tl.div_rn(g, g * 0 + tl.load(affine_ptr + c)) * kept(value, 0.0, 255.0, clamp_grad)


@triton.jit
def split_gradient(
    out_ptr, g_ptr, y_ptr, c_ptr, affine_ptr, clamp_grad, h, w, ch, cw,
    HALF: tl.constexpr, SMOOTH: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss/d (Y, Cb, Cr) of each pixel, [B, 3, h, w]: the last clamp and the colour transform, transposed."""
    b = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    red, green, blue = colours_at(y_ptr, c_ptr, b, pixel, inside, h, w, ch, cw, HALF, SMOOTH, False, INTEGER)
    at = b.to(tl.int64) * 3 * h * w + pixel
    gr = upstream(g_ptr, affine_ptr, at, inside, red, clamp_grad, 0)
    gg = upstream(g_ptr, affine_ptr, at + h * w, inside, green, clamp_grad, 1)
    gb = upstream(g_ptr, affine_ptr, at + 2 * h * w, inside, blue, clamp_grad, 2)
    tl.store(out_ptr + at, gr + gg + gb, mask=inside)
    tl.store(out_ptr + at + h * w, 1.772 * gb - 0.34413628620102216 * gg, mask=inside)
    tl.store(out_ptr + at + 2 * h * w, 1.402 * gr - 0.7141362862010221 * gg, mask=inside)


@triton.jit
def through_blocks(
    table_ptr, x, q, g, ROUNDING: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    """The gradient of a tile before the transform, from that after it: the tables cancel."""
    d = matrix(table_ptr, 0)
    u = sandwich(d, x) * tl.div_rn(q * 0 + 1.0, q)
    return sandwich(tl.trans(d), sandwich(d, g) * slope(u, ROUNDING, TERMS))


@triton.jit
def folded(g, rows, columns, r, col):
    """What was read from (rows, columns) is added there: a product with the 0/1 matrices of both maps."""
    down = tl.where(rows[None, :] == r[:, None], 1.0, 0.0)
    across = tl.where(columns[:, None] == col[None, :], 1.0, 0.0)
    return product(down, product(g, across))


@triton.jit
def direct(g_ptr, value_ptr, at, inside, clamp_grad):
    """A plane's gradient at full resolution, times the slope of the plane's clamp; 0 in the padding."""
    value = tl.load(value_ptr + at, mask=inside, other=0)
    return tl.load(g_ptr + at, mask=inside, other=0) * kept(value, -128.0, 127.0, clamp_grad)


@triton.jit
def row_of_taps(g_ptr, i, j, inside, h, w, cw, SMOOTH: tl.constexpr):
    """The horizontal half of the upsampling's adjoint, at row i of the gradient and column j of the plane."""
    ok = inside & (i < h)
    a = tl.load(g_ptr + i * w + 2 * j, mask=ok & (2 * j < w), other=0)
    b = tl.load(g_ptr + i * w + 2 * j + 1, mask=ok & (2 * j + 1 < w), other=0)
    if SMOOTH:
        left, right = tl.maximum(2 * j - 1, 0), tl.minimum(2 * j + 2, 2 * cw - 1)
        far = tl.load(g_ptr + i * w + left, mask=ok & (left < w), other=0)
        far += tl.load(g_ptr + i * w + right, mask=ok & (right < w), other=0)
        return 0.75 * (a + b) + 0.25 * far
    return a + b


@triton.jit
def luma_gradient(
    x_ptr, q_ptr, affine_ptr, table_ptr, g_ptr, y_ptr, clamp_grad, h, w, tiles_x,
    INTEGER: tl.constexpr, ROUNDING: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
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
    dy = through_blocks(table_ptr, y, table_tile(q_ptr, b, 0), g, ROUNDING, TERMS)
    tl.store(g_ptr + base + at, folded(dy, rows, columns, r, col), mask=inside)


@triton.jit
def gather_gradient(
    dx_ptr, x_ptr, q_ptr, affine_ptr, table_ptr, g_ptr, c_ptr, clamp_grad, h, w, ch, cw, tiles_x,
    HALF: tl.constexpr, SMOOTH: tl.constexpr, INTEGER: tl.constexpr, ROUNDING: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Chrominance's way back, and dx from it and from what `luma_gradient` left."""
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

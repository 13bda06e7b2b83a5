"""The stages of JPEG that the Triton kernels are made of: small functions on a tile or a run of pixels, in registers.

In the order of a picture's way: constants and rounding, colour and padding, the transform of blocks, upsampling and
colour again, then what the backward adds. Tiles are [16, 16]. table_ptr is the table of constant matrices (`_matrices`
in triton_kernels.py): 0 the DCT, 1 and 2 averages into the upper left and the lower right, 3 to 6 the digits of the
integer transforms. h, w are the picture's size and ch, cw that of its chrominance.
"""

import triton
import triton.language as tl

from poisonshield.ops.trigonometry import cosine_of_turns


@triton.jit
def product(a, b):
    """a @ b in float32's accuracy, [16, 16]: three tf32 products."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def sandwich(m, x):
    """m @ x @ m.T, [16, 16]."""
    return product(m, product(x, tl.trans(m)))


@triton.jit
def matrix(table_ptr, k: tl.constexpr):
    """The k-th constant matrix, [16, 16]."""
    i = tl.arange(0, 16)
    return tl.load(table_ptr + k * 256 + i[:, None] * 16 + i[None, :])


@triton.jit
def table_tile(q_ptr, b, which: tl.constexpr):
    """Table `which` of sample b repeated over four blocks, [16, 16]."""
    i = tl.arange(0, 16)
    return tl.load(q_ptr + b * 128 + which * 64 + (i[:, None] % 8) * 8 + i[None, :] % 8)


@triton.jit
def whole(v, INTEGER: tl.constexpr):
    """v rounded half up if INTEGER, else v."""
    return tl.floor(v + 0.5) if INTEGER else v


@triton.jit
def clamped(v, low, high):
    """v within [low, high]; a NaN stays."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def kept(v, low, high, clamp_grad):
    """The slope of a clamp at v: 1 inside [low, high], clamp_grad outside."""
    return tl.where((v >= low) & (v <= high), 1.0, clamp_grad)


@triton.jit
def nearest(u):
    """The nearest integer to u, halves away from zero, as libjpeg rounds coefficients."""
    n = tl.floor(tl.abs(u) + 0.5)
    return tl.where(u < 0, -n, n)


@triton.jit
def rounded(u, ROUNDING: tl.constexpr, TERMS: tl.constexpr):
    """What takes the place of rounding u: see `jpeg` for the formulas."""
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
    """d rounded(u)/d u as the backward uses it."""
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
    area = tl.cast(h, tl.int64) * w  # an integer 1 comes as a constexpr, which has no .to
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
def chroma_rows(r, h):
    """Where 4:2:0 chrominance reads row r: copied to an even count only, then the last *pair* is repeated."""
    even = h + h % 2
    return tl.minimum(tl.where(r >= even, even - 2 + r % 2, r), h - 1)


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
def stored(c_ptr, at, inside):
    """A plane at the offsets `at`, clamped and rounded to whole numbers."""
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
def chroma_at_whole(
    c_ptr, i, j, inside, ch, cw, HALF: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, INTEGER: tl.constexpr
):  # fmt: skip
    """One chrominance plane at pixel (i, j), centred; rounded to whole numbers if INTEGER."""
    if INTEGER and not EXACT:
        return whole(chroma_at_rounded(c_ptr, i, j, inside, ch, cw, HALF, SMOOTH), HALF)
    return chroma_at(c_ptr, i, j, inside, ch, cw, HALF, SMOOTH, EXACT)


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
def emit(out_ptr, affine_ptr, at, inside, v, c: tl.constexpr, INTEGER: tl.constexpr):
    """Writes channel c, clamped to 0..255, in the space of x."""
    v = whole(clamped(v, 0.0, 255.0), INTEGER)
    shift, scale = tl.load(affine_ptr + 3 + c), tl.load(affine_ptr + c)
    tl.store(out_ptr + at, tl.div_rn(v - shift, v * 0 + scale), mask=inside)


@triton.jit
def upstream(g_ptr, affine_ptr, at, inside, value, clamp_grad, c: tl.constexpr):
    """d loss/d output of channel c, per unit of 0..255, times the slope of the last clamp."""
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    return tl.div_rn(g, g * 0 + tl.load(affine_ptr + c)) * kept(value, 0.0, 255.0, clamp_grad)


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

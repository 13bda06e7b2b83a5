"""What the Triton kernels of a view do to a pixel's colour."""

import triton
import triton.language as tl


@triton.jit
def luma(r, g, b):
    """The gray of a colour."""
    return r * 0.299 + g * 0.587 + b * 0.114


@triton.jit
def mixed(v, other, factor):
    """From other towards v and beyond, by factor, within [0, 1]; a NaN stays."""
    v = tl.maximum(other + factor * (v - other), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def channel_of(hue, value, spread, turn: tl.constexpr):
    """A channel of the colour of that hue, in sixths of the circle; turn 5, 3, 1 for red, green, blue."""
    k = hue + turn
    k = k - 6.0 * tl.floor(k * (1.0 / 6.0))
    return value - spread * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def changed(r, g, b, change, factor, mean):
    """The colour after one change: 0 brightness, 1 contrast, 2 saturation, 3 hue by `factor` turns, others none."""
    if change < 3:
        other = luma(r, g, b)
        other = tl.where(change == 2, other, tl.where(change == 1, mean, 0.0))
        r, g, b = mixed(r, other, factor), mixed(g, other, factor), mixed(b, other, factor)
    elif change == 3:
        value = tl.maximum(tl.maximum(r, g), b)
        spread = value - tl.minimum(tl.minimum(r, g), b)
        apart = tl.where(value == r, g - b, tl.where(value == g, b - r, r - g))
        start = tl.where(value == r, 0.0, tl.where(value == g, 2.0, 4.0))
        hue = tl.div_rn(apart, tl.maximum(spread, 1e-8)) + start + 6.0 * factor
        r, g, b = (
            channel_of(hue, value, spread, 5),
            channel_of(hue, value, spread, 3),
            channel_of(hue, value, spread, 1),
        )
    return r, g, b


@triton.jit
def place_of_contrast(order_ptr, b):
    """At which of the four places contrast comes; 4 where it does not."""
    place = 4
    for i in tl.static_range(4):
        place = tl.where(tl.load(order_ptr + 4 * b + i) == 1, i, place)
    return place

"""Sines and cosines of turns for Triton kernels: a quadrant and a short series, where the library's need a stack."""

import triton
import triton.language as tl


@triton.jit
def cosine_of_turns(u, quarters):
    """cos(2 pi u), error about 1e-7 for u in [0, 1]; quarters = 3 gives sin(2 pi u)."""
    k = tl.floor(4.0 * u + 0.5)
    x = 6.283185307179586 * (u - 0.25 * k)  # within pi/4 of 0
    q = x * x
    sine = x * (1 + q * (-1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q / 362880))))
    cosine = 1 + q * (-0.5 + q * (1.0 / 24 + q * (-1.0 / 720 + q / 40320)))
    place = (k.to(tl.int32) + quarters) % 4
    value = tl.where(place % 2 == 0, cosine, sine)
    return tl.where((place == 1) | (place == 2), -value, value)

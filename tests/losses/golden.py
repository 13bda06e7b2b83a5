"""The inputs of the reference table of the losses: fixed waves, float64, [4, 6] per view."""

import math

import torch


def golden(views):
    """(online P, target M), one [4, 6] per view v, of

    P_v[n, d] = sin(1.3 n + 0.7 d + 0.5 v + 0.2 n d)   and   M_v[n, d] = cos(0.9 n - 0.4 d + 0.3 v + 0.1 n d).
    """

    def wave(f):
        return tuple(
            torch.tensor([[f(n, d, v) for d in range(6)] for n in range(4)], dtype=torch.float64) for v in range(views)
        )

    return (
        wave(lambda n, d, v: math.sin(1.3 * n + 0.7 * d + 0.5 * v + 0.2 * n * d)),
        wave(lambda n, d, v: math.cos(0.9 * n - 0.4 * d + 0.3 * v + 0.1 * n * d)),
    )

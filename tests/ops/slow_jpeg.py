"""A float64 JPEG written from the formulas with loops over blocks, to judge the fast one by. Shares no code with it."""

import math

import numpy as np

LUMA_ROW = [16, 11, 10, 16, 24, 40, 51, 61]  # first row of the standard's table, for a check of orientation


def basis() -> np.ndarray:
    c = np.zeros((8, 8))
    for k in range(8):
        for i in range(8):
            c[k, i] = math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * i + 1) * k / 16)
    return c


def rounded(u: float, rounding: str, terms: int) -> float:
    n = math.copysign(math.floor(abs(u) + 0.5), u)
    if rounding == "none":
        return u
    if rounding == "poly":
        return n + (u - n) ** 3
    if rounding == "fourier":
        return u - sum((-1) ** (k + 1) * math.sin(2 * math.pi * k * u) / (k * math.pi) for k in range(1, terms + 1))
    return n


def code_plane(plane: np.ndarray, table: np.ndarray, rounding: str, terms: int) -> np.ndarray:
    """Transform, round and transform back each block of a plane centred on 0, then clamp."""
    c, out = basis(), np.zeros_like(plane)
    for top in range(0, plane.shape[0], 8):
        for left in range(0, plane.shape[1], 8):
            u = (c @ plane[top : top + 8, left : left + 8] @ c.T) / table
            y = np.vectorize(lambda v: rounded(v, rounding, terms))(u) * table
            out[top : top + 8, left : left + 8] = c.T @ y @ c
    return np.clip(out, -128, 127)


def slow_jpeg(
    x: np.ndarray, tables: np.ndarray, *, subsampling: str, rounding: str, upsample: str, terms: int
) -> np.ndarray:
    """x [3, H, W] in [0, 1]; tables [2, 8, 8] scaled. Float64 throughout."""
    _, h, w = x.shape
    r, g, b = 255 * x.astype(np.float64)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = [y - 128, (b - y) / 1.772, (r - y) / 1.402]
    size = 8 if subsampling == "444" else 16
    up_h, up_w = -(-h // size) * size, -(-w // size) * size

    def pixel(p: np.ndarray, i: int, j: int) -> float:
        return p[min(i, h - 1), min(j, w - 1)]

    full = [np.array([[pixel(p, i, j) for j in range(up_w)] for i in range(up_h)]) for p in planes]
    luma = code_plane(full[0], tables[0], rounding, terms)[:h, :w]
    chroma = []
    for p in planes[1:]:
        if subsampling == "444":
            padded = np.array([[pixel(p, i, j) for j in range(up_w)] for i in range(up_h)])
            chroma.append(code_plane(padded, tables[1], rounding, terms)[:h, :w])
            continue
        rows, columns = (h + 1) // 2, up_w // 2
        small = np.array(
            [
                [np.mean([pixel(p, 2 * i + a, 2 * j + c) for a in (0, 1) for c in (0, 1)]) for j in range(columns)]
                for i in range(rows)
            ]
        )
        small = np.array([small[min(i, rows - 1)] for i in range(-(-rows // 8) * 8)])
        small = code_plane(small, tables[1], rounding, terms)[:rows, : (w + 1) // 2]
        chroma.append(np.array([[enlarged(small, i, j, upsample) for j in range(w)] for i in range(h)]))
    cb, cr = chroma
    green = (-0.114 * 1.772 * cb - 0.299 * 1.402 * cr) / 0.587
    rgb = np.stack([luma + 1.402 * cr, luma + green, luma + 1.772 * cb]) + 128
    return np.clip(rgb, 0, 255) / 255


def enlarged(small: np.ndarray, i: int, j: int, upsample: str) -> float:
    """One sample of twice the size: 3/4 of the nearest and 1/4 of the next, along each axis."""
    h, w = small.shape
    if upsample == "box" or w <= 2:
        return small[i // 2, j // 2]

    def near_far(k: int, n: int) -> tuple[int, int]:
        return k // 2, min(max(k // 2 + (1 if k % 2 else -1), 0), n - 1)

    (a, b), (c, d) = near_far(i, h), near_far(j, w)
    return 0.5625 * small[a, c] + 0.1875 * (small[b, c] + small[a, d]) + 0.0625 * small[b, d]

"""JPEG to the bit: libjpeg-turbo's default integer path (slow integer DCT, fancy upsampling), in plain PyTorch.

uint8 in, uint8 out, equal to encoding and decoding with libjpeg-turbo 4:4:4 or 4:2:0. Before its rounding shift a DCT
pass is a linear map with integer coefficients, so a pass is one matrix product and one shift. Products run in float64,
where every intermediate (below 2^31) is exact. Source: ITU-T T.81 and the jidctint/jfdctint algorithm (Loeffler et al.
1989). Not equal to libjpeg 7 and later, mozjpeg, or decoders with merged or box upsampling.
"""

import torch
from torch import Tensor

from poisonshield.ops.jpeg.constants import kept
from poisonshield.ops.jpeg.padding import pad_before_averaging, pad_chroma_rows, pad_to

# 2^13 times sums and differences of cosines, rounded: the multipliers of the butterfly.
_Z = {"even": 4433, "two": 6270, "six": -15137, "five": 9633, "z1": -7373, "z2": -20995, "z3": -16069, "z4": -3196}
_ODD = (2446, 16819, 25172, 12299)  # outputs 7, 5, 3, 1


@kept
def _forward_pass(dtype: torch.dtype, device: torch.device) -> Tensor:
    return forward_matrix().to(device, dtype)


@kept
def _inverse_pass(dtype: torch.dtype, device: torch.device) -> Tensor:
    return inverse_matrix().to(device, dtype)


def forward_matrix() -> Tensor:
    """Integer [8, 8], int64: a forward pass is (matrix @ x + 2^(n-1)) >> n, n = 11 over rows, then 15 over columns."""
    x = torch.eye(8, dtype=torch.int64)  # row i is input i, pushed through the butterfly
    s, d = [x[i] + x[7 - i] for i in range(4)], [x[i] - x[7 - i] for i in range(4)]
    t10, t13, t11, t12 = s[0] + s[3], s[0] - s[3], s[1] + s[2], s[1] - s[2]
    z = (t12 + t13) * _Z["even"]
    o1, o3, o5, o7 = _odd_part(d[3], d[2], d[1], d[0])
    rows = (t10 + t11) * 8192, o1, z + _Z["two"] * t13, o3, (t10 - t11) * 8192, o5, z + _Z["six"] * t12, o7
    return torch.stack(rows)


def inverse_matrix() -> Tensor:
    """Integer [8, 8], int64: one inverse pass, n = 11 over columns, then n = 18 over rows."""
    v = torch.eye(8, dtype=torch.int64)
    z = (v[2] + v[6]) * _Z["even"]
    t2, t3 = z + _Z["six"] * v[6], z + _Z["two"] * v[2]
    t0, t1 = (v[0] + v[4]) * 8192, (v[0] - v[4]) * 8192
    even = t0 + t3, t1 + t2, t1 - t2, t0 - t3
    odd = _odd_part(v[7], v[5], v[3], v[1])
    return torch.stack([e + o for e, o in zip(even, odd, strict=True)] + [even[i] - odd[i] for i in (3, 2, 1, 0)])


def _odd_part(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The butterfly's odd half on (x7, x5, x3, x1) or the differences (4, 5, 6, 7): results for 1 or 0, 3, 5, 7."""
    z1, z2, z3, z4 = a + d, b + c, a + c, b + d
    z5 = (z3 + z4) * _Z["five"]
    z1, z2, z3, z4 = z1 * _Z["z1"], z2 * _Z["z2"], z3 * _Z["z3"] + z5, z4 * _Z["z4"] + z5
    m0, m1, m2, m3 = _ODD
    return m3 * d + z1 + z4, m2 * c + z2 + z3, m1 * b + z2 + z4, m0 * a + z1 + z3


def exact_jpeg(pixels: Tensor, tables: Tensor, subsampling: str) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 of that shape: encoded and decoded. tables [B or 1, 2, 8, 8], whole, 1..255."""
    h, w = pixels.shape[-2:]
    y, chroma = exact_coefficients(pixels, tables, subsampling)
    luma = _decode(y, tables[:, :1])[..., :h, :w]
    ch, cw = (h, w) if subsampling == "444" else ((h + 1) // 2, (w + 1) // 2)
    chroma = _decode(chroma, tables[:, 1:])[..., :ch, :cw]
    if subsampling == "420":
        chroma = _upsample(chroma)[..., :h, :w]
    return _to_rgb(luma, chroma)


def exact_coefficients(pixels: Tensor, tables: Tensor, subsampling: str) -> tuple[Tensor, Tensor]:
    """Quantised coefficients as planes, int32: luminance [B, 1, H', W'] and chrominance [B, 2, H'', W''], padded."""
    planes = _to_ycc(pixels)  # [B, 3, H, W]
    mcu = 8 if subsampling == "444" else 16
    y, chroma = pad_to(planes[:, :1], mcu), planes[:, 1:]
    chroma = pad_to(chroma, 8) if subsampling == "444" else pad_chroma_rows(_downsample(chroma))
    return _encode(y, tables[:, :1]), _encode(chroma, tables[:, 1:])


def _to_ycc(pixels: Tensor) -> Tensor:
    r, g, b = pixels.to(torch.int32).unbind(1)
    half, bias = 1 << 15, (128 << 16) + 32767  # 32767, not 32768, in libjpeg
    y = (19595 * r + 38470 * g + 7471 * b + half) >> 16
    cb = (-11059 * r - 21709 * g + 32768 * b + bias) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + bias) >> 16
    return torch.stack((y, cb, cr), 1)


def _to_rgb(y: Tensor, chroma: Tensor) -> Tensor:
    y, (cb, cr), half = y[:, 0], (chroma - 128).unbind(1), 1 << 15
    r = y + ((91881 * cr + half) >> 16)
    g = y + ((-22554 * cb - 46802 * cr + half) >> 16)
    b = y + ((116130 * cb + half) >> 16)
    return torch.stack((r, g, b), 1).clamp(0, 255).to(torch.uint8)


def _downsample(planes: Tensor) -> Tensor:
    """2x2 means of columns padded to 16 and rows padded to an even number; the bias alternates 1, 2 along a row."""
    planes = pad_before_averaging(planes)
    rows = planes[..., 0::2, :] + planes[..., 1::2, :]
    bias = 1 + (torch.arange(rows.shape[-1] // 2, device=rows.device, dtype=rows.dtype) & 1)
    return (rows[..., 0::2] + rows[..., 1::2] + bias) >> 2


def _upsample(planes: Tensor) -> Tensor:
    """Twice the size with the triangle filter 3:1, rounded as libjpeg does; up to two columns are copied instead."""
    if planes.shape[-1] <= 2:
        return planes.repeat_interleave(2, -1).repeat_interleave(2, -2)
    up = torch.cat((planes[..., :1, :], planes[..., :-1, :]), -2)
    down = torch.cat((planes[..., 1:, :], planes[..., -1:, :]), -2)
    v = torch.stack((3 * planes + up, 3 * planes + down), -2).flatten(-3, -2)  # [B, 2, 2h, w]
    left = torch.cat((v[..., :1], v[..., :-1]), -1)
    right = torch.cat((v[..., 1:], v[..., -1:]), -1)
    return torch.stack(((3 * v + left + 8) >> 4, (3 * v + right + 7) >> 4), -1).flatten(-2)


def _encode(planes: Tensor, table: Tensor) -> Tensor:
    m = _forward_pass(torch.float64, planes.device)
    c = _passes(planes - 128, m, (-1, 11), (-2, 15))  # 8 times the orthonormal transform
    q = _tile(table, planes).to(torch.int32)
    return c.sign() * torch.div(c.abs() + 4 * q, 8 * q, rounding_mode="floor")


def _decode(coefficients: Tensor, table: Tensor) -> Tensor:
    c = coefficients * _tile(table, coefficients).to(torch.int32)
    return (_passes(c, _inverse_pass(torch.float64, c.device), (-2, 11), (-1, 18)) + 128).clamp(0, 255)


def _passes(planes: Tensor, matrix: Tensor, *passes: tuple[int, int]) -> Tensor:
    """One product and rounding shift along each (dim, bits), on blocks of 8. int32 in and out."""
    x = planes.to(torch.float64)
    for dim, bits in passes:
        blocks = x.unflatten(-1, (-1, 8)) @ matrix.T if dim == -1 else matrix @ x.unflatten(-2, (-1, 8))
        x = ((blocks + 2 ** (bits - 1)) * 2.0**-bits).floor().flatten(-2 if dim == -1 else -3, -1 if dim == -1 else -2)
    return x.to(torch.int32)


def _tile(table: Tensor, planes: Tensor) -> Tensor:
    """[B, 1, 8, 8] repeated over planes [B, C, H, W]: [B, 1, H, W]."""
    return table.repeat(1, 1, planes.shape[-2] // 8, planes.shape[-1] // 8)

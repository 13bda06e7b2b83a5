"""Differentiable JPEG in plain PyTorch: colour, 2x2 means, DCT, rounding with a slope, and the way back.

The backward is written out: the DCT is orthonormal, so its adjoint is its inverse and the tables cancel. It recomputes
everything from x, so that only x and the tables are kept. Planes are centred: 128 is taken off once, by the colour
transform. Batches go through in pieces that stay in a CPU's cache, which is worth a factor of two or more there.
Sources: ITU-T T.81 (transform, tables), JFIF (colour), Shin and Song 2017 (cubic rounding). `mode="exact"` computes the
forward in integers (exact.py) and keeps this backward, taken at the unrounded input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.ops.jpeg.exact import exact_jpeg
from poisonshield.ops.jpeg.padding import fold, pad_before_averaging, pad_chroma_rows, pad_to

_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587), (1.0, 1.772, 0.0))
_PIECE = 1 << 18  # elements of x per piece


def jpeg(
    x: Tensor,
    tables: Tensor,
    affine: Tensor,
    subsampling: str,
    mode: str,
    rounding: str,
    fourier_terms: int,
    upsample: str,
    integer_planes: bool,
    clamp_grad: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [B, 3, H, W], tables [B, 2, 8, 8], affine [2, 3]: pixel in 0..255 = x * affine[0] + affine[1]."""

    def piece(x: Tensor, tables: Tensor) -> Tensor:
        if mode == "exact":
            return _exact(x, tables, affine, subsampling)
        return Pipeline(x, tables, affine, subsampling, rounding, fourier_terms, upsample, integer_planes).output()

    out = torch.empty_like(x, dtype=out_dtype)
    for part in _pieces(x):
        out[part] = piece(x[part], tables[part])
    return out


def jpeg_backward(
    grad: Tensor,
    x: Tensor,
    tables: Tensor,
    affine: Tensor,
    subsampling: str,
    rounding: str,
    fourier_terms: int,
    upsample: str,
    integer_planes: bool,
    clamp_grad: float,
    table_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for x [B, 3, H, W] and the tables [B, 2, 8, 8] (empty unless asked for)."""
    dx = torch.empty_like(x)
    dtables = torch.empty_like(tables) if table_grad else tables.new_empty(0)
    for part in _pieces(x):
        pipeline = Pipeline(
            x[part], tables[part], affine, subsampling, rounding, fourier_terms, upsample, integer_planes
        )
        dx[part], by_table = pipeline.gradient(grad[part], clamp_grad, table_grad)
        if table_grad:
            dtables[part] = by_table
    return dx, dtables


def _pieces(x: Tensor) -> list[slice]:
    whole = torch.compiler.is_compiling() or x.is_cuda
    size = len(x) if whole else max(1, _PIECE // max(1, x[:1].numel()))
    return [slice(i, i + size) for i in range(0, len(x), max(1, size))]


class Pipeline:
    """One batch on its way through: the coefficients of x in units of the tables, and what follows from them."""

    def __init__(
        self,
        x: Tensor,
        tables: Tensor,
        affine: Tensor,
        subsampling: str,
        rounding: str,
        fourier_terms: int,
        upsample: str,
        integer_planes: bool,
    ) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.h, self.w = x.shape[-2:]
        self.half_chroma = subsampling == "420"
        self.rounding, self.terms = rounding, fourier_terms
        self.integer = (lambda v: (v + 0.5).floor()) if integer_planes else (lambda v: v)
        self.scale, self.shift = affine.to(self.dtype)
        self.tables = tables.to(self.dtype)
        self.dct = dct_matrix(self.dtype, x.device)
        chroma_size = ((self.h + 1) // 2, (self.w + 1) // 2) if self.half_chroma else (self.h, self.w)
        self.chroma_size = chroma_size
        # Up to two columns of chrominance are copied, not interpolated, as in libjpeg.
        self.smooth = upsample == "fancy" and chroma_size[1] > 2

        planes = self.integer(self._to_ycc(x.to(self.dtype).contiguous()))
        chroma = planes[:, 1:]
        if self.half_chroma:
            luma = pad_to(planes[:, :1], 16)
            self.averaged = self.integer(F.avg_pool2d(pad_before_averaging(chroma), 2))
            chroma = pad_chroma_rows(self.averaged)
        else:
            luma, chroma = pad_to(planes[:, :1], 8), pad_to(chroma, 8)
        self.q = _tile(self.tables[:, :1], luma), _tile(self.tables[:, 1:], chroma)
        self.u = tuple(
            self._forward_dct(p).mul_(_tile(1 / self.tables[:, i : i + 1], p)) for i, p in enumerate((luma, chroma))
        )

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Luminance and chrominance after the inverse transform, before they are clamped to [-128, 127]."""
        luma, chroma = (
            self._inverse_dct(round_(u, self.rounding, self.terms).mul_(q)) for u, q in zip(self.u, self.q, strict=True)
        )
        return luma, chroma

    def colours(self, luma: Tensor, chroma: Tensor) -> Tensor:
        """RGB in 0..255 before it is clamped, [B, 3, H, W]."""
        luma = self.integer(luma.clamp(-128, 127))[..., : self.h, : self.w]
        chroma = self.integer(chroma.clamp(-128, 127))
        if self.half_chroma:
            chroma = chroma[..., : self.chroma_size[0], : self.chroma_size[1]]
            mode = {"mode": "bilinear", "align_corners": False} if self.smooth else {"mode": "nearest"}
            chroma = self.integer(F.interpolate(chroma, scale_factor=2, **mode))
        chroma = chroma[..., : self.h, : self.w]
        cb, cr = chroma[:, 0], chroma[:, 1]
        y = luma[:, 0] + 128
        red = torch.add(y, cr, alpha=_TO_RGB[0][2])
        green = torch.add(y, cb, alpha=_TO_RGB[1][1]).add_(cr, alpha=_TO_RGB[1][2])
        blue = torch.add(y, cb, alpha=_TO_RGB[2][1])
        return torch.stack((red, green, blue), 1)

    def output(self) -> Tensor:
        """[B, 3, H, W] in the space of x."""
        rgb = self.integer(self.colours(*self.decoded()).clamp_(0, 255))
        return self._from_pixels(rgb)

    def gradient(self, grad: Tensor, clamp_grad: float, table_grad: bool) -> tuple[Tensor, Tensor | None]:
        """d loss/d x from d loss/d output, and the same for the tables."""
        luma, chroma = self.decoded()
        g = grad.to(self.dtype) / self.scale[:, None, None]
        g = _masked(g, self.colours(luma, chroma), 0, 255, clamp_grad)
        g = self._apply(_TO_RGB, g, transposed=True)  # per plane, [B, 3, H, W]
        g_luma, g_chroma = g[:, :1], g[:, 1:]
        if self.half_chroma:
            g_chroma = F.pad(g_chroma, (0, self.w % 2, 0, self.h % 2))
            g_chroma = _triangle_adjoint(g_chroma) if self.smooth else 4 * F.avg_pool2d(g_chroma, 2)
        by_table = []
        grads = []
        for g, decoded, u in ((g_luma, luma, self.u[0]), (g_chroma, chroma, self.u[1])):
            g = F.pad(g, (0, decoded.shape[-1] - g.shape[-1], 0, decoded.shape[-2] - g.shape[-2]))
            g = self._forward_dct(_masked(g, decoded, -128, 127, clamp_grad))
            slope = slope_(u, self.rounding, self.terms)
            if table_grad:
                by_table.append(_sum_blocks(g * (round_(u, self.rounding, self.terms) - u * slope)))
            grads.append(self._inverse_dct(g * slope))
        g_luma, g_chroma = fold(grads[0], self.h, self.w), grads[1]
        if self.half_chroma:
            g_chroma = fold(g_chroma, *self.averaged.shape[-2:])
            g_chroma = F.interpolate(g_chroma * 0.25, scale_factor=2, mode="nearest")
        g = torch.cat((g_luma, fold(g_chroma, self.h, self.w)), 1)
        g = self._apply(_TO_YCC, g, transposed=True) * self.scale[:, None, None]
        return g, torch.stack(by_table, 1) if table_grad else None

    def _to_ycc(self, x: Tensor) -> Tensor:
        matrix = torch.tensor(_TO_YCC, dtype=self.dtype, device=x.device)
        bias = matrix @ self.shift - torch.tensor((128.0, 0.0, 0.0), dtype=self.dtype, device=x.device)
        return _mix(matrix * self.scale, x, bias)

    def _apply(self, matrix: tuple[tuple[float, ...], ...], planes: Tensor, transposed: bool) -> Tensor:
        m = torch.tensor(matrix, dtype=self.dtype, device=planes.device)
        return _mix(m.T if transposed else m, planes, None)

    def _from_pixels(self, rgb: Tensor) -> Tensor:
        return rgb.sub_(self.shift[:, None, None]).div_(self.scale[:, None, None])

    def _forward_dct(self, planes: Tensor) -> Tensor:
        """The orthonormal 8x8 DCT of each block, in place of the block: [B, C, H, W] with sizes divisible by 8."""
        return _blockwise(self.dct, planes)

    def _inverse_dct(self, planes: Tensor) -> Tensor:
        return _blockwise(self.dct.T, planes)


def dct_matrix(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row k of [8, 8] is the k-th cosine, orthonormal."""
    k, i = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    d = torch.cos((2 * i + 1) * k * math.pi / 16) / 2
    d[0] *= math.sqrt(0.5)
    return d.to(device, dtype)


def nearest(u: Tensor) -> Tensor:
    """The nearest integer, halves away from zero, as libjpeg rounds coefficients."""
    return torch.add(u, u.sign(), alpha=0.5).trunc_()


def round_(u: Tensor, rounding: str, terms: int) -> Tensor:
    """What takes the place of rounding in the forward; a new tensor."""
    if rounding == "none":
        return u.clone()
    if rounding == "fourier":
        return u - sum((-1) ** (k + 1) / (k * math.pi) * torch.sin(2 * math.pi * k * u) for k in range(1, terms + 1))
    n = nearest(u)
    if rounding != "poly":
        return n  # hard, ste, poly_ste
    e = u - n
    return n.addcmul_(e, e * e)


def slope_(u: Tensor, rounding: str, terms: int) -> Tensor:
    """The derivative that the backward uses."""
    if rounding in ("none", "ste"):
        return torch.ones_like(u)
    if rounding == "hard":
        return torch.zeros_like(u)
    if rounding == "fourier":
        return 1 - 2 * sum((-1) ** (k + 1) * torch.cos(2 * math.pi * k * u) for k in range(1, terms + 1))
    e = u - nearest(u)  # poly, poly_ste
    return e.mul_(e).mul_(3)


def _blockwise(m: Tensor, planes: Tensor) -> Tensor:
    """m @ block @ m.T for each 8x8 block."""
    b, c, h, w = planes.shape
    rows = planes.reshape(-1, 8) @ m.T
    return (m @ rows.view(-1, 8, w)).view(b, c, h, w)


def _mix(matrix: Tensor, planes: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 matrix (and offset) over the channels of [B, 3, H, W]."""
    if torch.compiler.is_compiling():  # elementwise, which fuses with its neighbours; a product would not
        rows = [sum(m[j] * planes[:, j] for j in range(3)) for m in matrix]
        return torch.stack(rows if bias is None else [r + b for r, b in zip(rows, bias, strict=True)], 1)
    flat = planes.reshape(len(planes), 3, -1)
    m = matrix.expand(len(planes), 3, 3)
    mixed = torch.bmm(m, flat) if bias is None else torch.baddbmm(bias[:, None], m, flat)
    return mixed.view(planes.shape)


def _tile(table: Tensor, planes: Tensor) -> Tensor:
    """[B, 1, 8, 8] repeated over planes [B, C, H, W]: [B, 1, H, W]."""
    return table.repeat(1, 1, planes.shape[-2] // 8, planes.shape[-1] // 8)


def _sum_blocks(planes: Tensor) -> Tensor:
    """[B, C, H, W] summed over channels and blocks: [B, 8, 8]."""
    return planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).sum((1, 2, 4))


def _masked(g: Tensor, value: Tensor, low: float, high: float, slope: float) -> Tensor:
    """g where value is inside [low, high], slope * g outside (and where value is NaN)."""
    inside = (value >= low) & (value <= high)
    return g * inside if slope == 0 else torch.where(inside, g, slope * g)


def _triangle_adjoint(g: Tensor) -> Tensor:
    """The adjoint of x2 bilinear interpolation with replicated borders, both axes: [B, C, 2h, 2w] -> [B, C, h, w]."""
    return _triangle_adjoint_1d(_triangle_adjoint_1d(g).mT).mT


def _triangle_adjoint_1d(g: Tensor) -> Tensor:
    # out[2i] = (3 v[i] + v[i-1]) / 4 and out[2i+1] = (3 v[i] + v[i+1]) / 4; indices beyond an end stay at it.
    even, odd = g[..., 0::2], g[..., 1::2]
    v = (even + odd) * 0.75
    v[..., 1:] += 0.25 * odd[..., :-1]
    v[..., :-1] += 0.25 * even[..., 1:]
    v[..., 0] += 0.25 * even[..., 0]
    v[..., -1] += 0.25 * odd[..., -1]
    return v


def _exact(x: Tensor, tables: Tensor, affine: Tensor, subsampling: str) -> Tensor:
    if x.dtype == torch.uint8:
        return exact_jpeg(x, tables, subsampling)
    scale, shift = affine.to(torch.promote_types(x.dtype, torch.float32))[:, :, None, None]
    pixels = to_pixels(x, affine)
    return (exact_jpeg(pixels, tables, subsampling).to(scale.dtype) - shift) / scale


def to_pixels(x: Tensor, affine: Tensor) -> Tensor:
    """uint8: rounded half up, clamped to 0..255; NaN becomes 0."""
    if x.dtype == torch.uint8:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift = affine.to(dtype)[:, :, None, None]
    return (x.to(dtype) * scale + shift + 0.5).floor().nan_to_num(0.0, 255.0, 0.0).clamp(0, 255).to(torch.uint8)

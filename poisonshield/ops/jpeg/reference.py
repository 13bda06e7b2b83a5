"""Differentiable JPEG in plain PyTorch: colour, 2x2 means, DCT, rounding with a slope, and the way back.

The backward is written out: the DCT is orthonormal, so its adjoint is its inverse and the tables cancel. It recomputes
everything from x, so that only x and the tables are kept. Planes are centred: 128 is taken off once, by the colour
transform. Batches go through in pieces that stay in a CPU's cache, which is worth a factor of two or more there.
Sources: ITU-T T.81 (transform, tables), JFIF (colour), Shin and Song 2017 (cubic rounding). `mode="exact"` computes the
forward in integers (exact.py) and keeps this backward, taken at the unrounded input.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.ops.jpeg.constants import kept
from poisonshield.ops.jpeg.exact import exact_jpeg
from poisonshield.ops.jpeg.padding import fold, pad_before_averaging, pad_chroma_rows, pad_to
from poisonshield.ops.jpeg.tables import scaled_tables
from poisonshield.random import philox_uniform

_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587), (1.0, 1.772, 0.0))
_PIECE = 1 << 18  # elements of x per piece


class JpegSettings(NamedTuple):
    """How a picture is compressed, the same forward and backward."""

    subsampling: str = "420"  # "420" (chrominance at half the size) or "444"
    rounding: str = "poly"  # of coefficients: "poly", "ste", "hard", "poly_ste", "fourier" or "none"
    fourier_terms: int = 10  # of the sawtooth's series, for "fourier"
    upsample: str = "fancy"  # "fancy" (triangle filter) or "box"
    integer_planes: bool = False  # whether every stored plane is rounded, with slope 1
    clamp_grad: float = 0.0  # slope where a clamp cuts, 0 (none) to 1


class JpegArguments(NamedTuple):
    """What `jpeg` takes."""

    x: Tensor  # [B, 3, H, W], RGB
    tables: Tensor  # [B, 2, 8, 8], quantisation of luminance and chrominance
    affine: Tensor  # [2, 3]: pixel in 0..255 = x * affine[0] + affine[1], per channel
    mode: str  # "smooth" or "exact"
    settings: JpegSettings
    out_dtype: torch.dtype  # of the result


class JpegGradientArguments(NamedTuple):
    """What `jpeg_backward` takes: the upstream gradient, and the forward's arguments again."""

    grad: Tensor  # [B, 3, H, W], d loss/d output
    x: Tensor  # [B, 3, H, W]
    tables: Tensor  # [B, 2, 8, 8]
    affine: Tensor  # [2, 3]
    settings: JpegSettings
    table_grad: bool  # whether the second output is the gradient for the tables or empty


def jpeg(args: JpegArguments) -> Tensor:
    """x compressed and decompressed, [B, 3, H, W] in the space of x."""
    out = torch.empty_like(args.x, dtype=args.out_dtype)
    for part in _pieces(args.x):
        x, tables = args.x[part], args.tables[part]
        if args.mode == "exact":
            out[part] = _exact(x, tables, args.affine, args.settings.subsampling)
        else:
            out[part] = Pipeline(x, tables, args.affine, args.settings).output()
    return out


def jpeg_backward(args: JpegGradientArguments) -> tuple[Tensor, Tensor]:
    """Gradients for x [B, 3, H, W] and the tables [B, 2, 8, 8] (empty unless asked for)."""
    dx = torch.empty_like(args.x)
    dtables = torch.empty_like(args.tables) if args.table_grad else args.tables.new_empty(0)
    for part in _pieces(args.x):
        pipeline = Pipeline(args.x[part], args.tables[part], args.affine, args.settings)
        dx[part], by_table = pipeline.gradient(args.grad[part], args.table_grad)
        if by_table is not None:
            dtables[part] = by_table
    return dx, dtables


def _pieces(x: Tensor) -> list[slice]:
    """Rows of x that fit into a CPU's cache together; all of them elsewhere."""
    whole = torch.compiler.is_compiling() or x.is_cuda
    size = len(x) if whole else max(1, _PIECE // max(1, x[:1].numel()))
    return [slice(i, i + size) for i in range(0, len(x), max(1, size))]


class Pipeline:
    """One batch on its way through: the coefficients of x in units of the tables, and what follows from them.

    x [B, 3, H, W], tables [B, 2, 8, 8], affine [2, 3]. u holds the coefficients of luminance [B, 1, H', W'] and
    chrominance [B, 2, H'', W''], each in place of its block; sizes with a dash are padded to whole blocks.
    """

    def __init__(self, x: Tensor, tables: Tensor, affine: Tensor, settings: JpegSettings) -> None:
        self.settings = settings
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.h, self.w = x.shape[-2:]
        self.half_chroma = settings.subsampling == "420"
        self.chroma_size = ((self.h + 1) // 2, (self.w + 1) // 2) if self.half_chroma else (self.h, self.w)
        # Up to two columns of chrominance are copied, not interpolated, as in libjpeg.
        self.smooth = settings.upsample == "fancy" and self.chroma_size[1] > 2
        self.scale, self.shift = affine.to(self.dtype)  # [3], [3]
        self.dct = dct_matrix(self.dtype, x.device)
        tables = tables.to(self.dtype)

        luma, chroma = self._pad(self._store(self._to_ycc(x.to(self.dtype).contiguous())))
        self.q = _tile(tables[:, :1], luma), _tile(tables[:, 1:], chroma)
        self.u = tuple(
            self._forward_dct(p).mul_(_tile(1 / tables[:, i : i + 1], p)) for i, p in enumerate((luma, chroma))
        )

    def output(self) -> Tensor:
        """[B, 3, H, W] in the space of x."""
        rgb = self._store(self.colours(*self.decoded()).clamp_(0, 255))
        return rgb.sub_(self.shift[:, None, None]).div_(self.scale[:, None, None])

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Luminance and chrominance after the inverse transform, before they are clamped to [-128, 127]."""
        luma, chroma = (self._inverse_dct(self._round(u).mul_(q)) for u, q in zip(self.u, self.q, strict=True))
        return luma, chroma  # [B, 1, H', W'], [B, 2, H'', W'']

    def colours(self, luma: Tensor, chroma: Tensor) -> Tensor:
        """RGB in 0..255 before it is clamped, [B, 3, H, W]."""
        luma = self._store(luma.clamp(-128, 127))[..., : self.h, : self.w]  # [B, 1, H, W]
        chroma = self._store(chroma.clamp(-128, 127))
        if self.half_chroma:
            chroma = chroma[..., : self.chroma_size[0], : self.chroma_size[1]]
            chroma = self._store(self._upsample(chroma))
        chroma = chroma[..., : self.h, : self.w]  # [B, 2, H, W]
        cb, cr = chroma[:, 0], chroma[:, 1]
        y = luma[:, 0] + 128
        red = torch.add(y, cr, alpha=_TO_RGB[0][2])
        green = torch.add(y, cb, alpha=_TO_RGB[1][1]).add_(cr, alpha=_TO_RGB[1][2])
        blue = torch.add(y, cb, alpha=_TO_RGB[2][1])
        return torch.stack((red, green, blue), 1)

    def gradient(self, grad: Tensor, table_grad: bool) -> tuple[Tensor, Tensor | None]:
        """d loss/d x [B, 3, H, W] from d loss/d output, and d loss/d tables [B, 2, 8, 8]: the stages in reverse."""
        luma, chroma = self.decoded()
        g = grad.to(self.dtype) / self.scale[:, None, None]
        g = self._clamp(g, self.colours(luma, chroma), 0, 255)
        g = _mix(_to_rgb(self.dtype, g.device).T, g, None)  # d loss/d (Y, Cb, Cr), [B, 3, H, W]
        g_chroma = self._upsample_adjoint(g[:, 1:]) if self.half_chroma else g[:, 1:]
        g_luma, luma_table = self._through_blocks(g[:, :1], luma, self.u[0], table_grad)
        g_chroma, chroma_table = self._through_blocks(g_chroma, chroma, self.u[1], table_grad)
        g = _mix(_to_ycc(self.dtype, g.device).T, self._pad_adjoint(g_luma, g_chroma), None)
        g = g * self.scale[:, None, None]
        if luma_table is None or chroma_table is None:
            return g, None
        return g, torch.stack((luma_table, chroma_table), 1)

    def _to_ycc(self, x: Tensor) -> Tensor:
        """Y, Cb and Cr, centred on 0: [B, 3, H, W]."""
        matrix = _to_ycc(self.dtype, x.device)
        bias = matrix @ self.shift
        bias[0] -= 128
        return _mix(matrix * self.scale, x, bias)

    def _store(self, planes: Tensor) -> Tensor:
        """Rounded half up where planes are whole numbers; the gradient passes straight through."""
        return (planes + 0.5).floor() if self.settings.integer_planes else planes

    def _pad(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Luminance [B, 1, H', W'] and, averaged for 4:2:0, chrominance [B, 2, H'', W''], in whole blocks."""
        luma, chroma = planes[:, :1], planes[:, 1:]
        if not self.half_chroma:
            return pad_to(luma, 8), pad_to(chroma, 8)
        averaged = self._store(F.avg_pool2d(pad_before_averaging(chroma), 2))
        self.averaged_size = averaged.shape[-2:]
        return pad_to(luma, 16), pad_chroma_rows(averaged)

    def _pad_adjoint(self, g_luma: Tensor, g_chroma: Tensor) -> Tensor:
        """The adjoint of `_pad`: [B, 3, H, W]."""
        if self.half_chroma:
            g_chroma = fold(g_chroma, *self.averaged_size)
            g_chroma = F.interpolate(g_chroma * 0.25, scale_factor=2, mode="nearest")
        return torch.cat((fold(g_luma, self.h, self.w), fold(g_chroma, self.h, self.w)), 1)

    def _upsample(self, chroma: Tensor) -> Tensor:
        """[B, 2, h, w] -> [B, 2, 2h, 2w]."""
        if self.smooth:
            return F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        return F.interpolate(chroma, scale_factor=2, mode="nearest")

    def _upsample_adjoint(self, g: Tensor) -> Tensor:
        """[B, 2, H, W] -> [B, 2, h, w]."""
        g = F.pad(g, (0, self.w % 2, 0, self.h % 2))
        return _triangle_adjoint(g) if self.smooth else 4 * F.avg_pool2d(g, 2)

    def _through_blocks(self, g: Tensor, decoded: Tensor, u: Tensor, table_grad: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient before the transform, from that after it; and that of the table [B, 8, 8]."""
        g = F.pad(g, (0, decoded.shape[-1] - g.shape[-1], 0, decoded.shape[-2] - g.shape[-2]))
        g = self._forward_dct(self._clamp(g, decoded, -128, 127))
        slope = slope_(u, self.settings.rounding, self.settings.fourier_terms)
        by_table = _sum_blocks(g * (self._round(u) - u * slope)) if table_grad else None
        return self._inverse_dct(g * slope), by_table

    def _round(self, u: Tensor) -> Tensor:
        return round_(u, self.settings.rounding, self.settings.fourier_terms)

    def _clamp(self, g: Tensor, value: Tensor, low: float, high: float) -> Tensor:
        """g where value is inside [low, high], clamp_grad * g outside (and where value is NaN)."""
        inside, slope = (value >= low) & (value <= high), self.settings.clamp_grad
        return g * inside if slope == 0 else torch.where(inside, g, slope * g)

    def _forward_dct(self, planes: Tensor) -> Tensor:
        """The orthonormal 8x8 DCT of each block, in place of the block: [B, C, H, W] with sizes divisible by 8."""
        return _blockwise(self.dct, planes)

    def _inverse_dct(self, planes: Tensor) -> Tensor:
        return _blockwise(self.dct.T, planes)


@kept
def _to_ycc(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_TO_YCC, dtype=dtype, device=device)


@kept
def _to_rgb(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_TO_RGB, dtype=dtype, device=device)


@kept
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
    rows = planes.reshape(-1, 8) @ m.T  # [B C h w / 8, 8]
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


def _triangle_adjoint(g: Tensor) -> Tensor:
    """The adjoint of x2 bilinear interpolation with replicated borders, both axes: [B, C, 2h, 2w] -> [B, C, h, w]."""
    return _triangle_adjoint_1d(_triangle_adjoint_1d(g).mT).mT


def _triangle_adjoint_1d(g: Tensor) -> Tensor:
    """[..., 2w] -> [..., w]."""
    # out[2i] = (3 v[i] + v[i-1]) / 4 and out[2i+1] = (3 v[i] + v[i+1]) / 4; indices beyond an end stay at it.
    even, odd = g[..., 0::2], g[..., 1::2]
    v = (even + odd) * 0.75
    v[..., 1:] += 0.25 * odd[..., :-1]
    v[..., :-1] += 0.25 * even[..., 1:]
    v[..., 0] += 0.25 * even[..., 0]
    v[..., -1] += 0.25 * odd[..., -1]
    return v


def _exact(x: Tensor, tables: Tensor, affine: Tensor, subsampling: str) -> Tensor:
    """[B, 3, H, W] in the space of x, through libjpeg's integers."""
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


def examples() -> dict[str, list[Any]]:
    """Calls that the contract tests make of each op on every backend."""
    x, grad = (philox_uniform((2, 3, 17, 9), seed) * 0.8 + 0.1 for seed in range(2))
    tables, affine = scaled_tables(torch.tensor([30.0, 80.0])), torch.tensor([[255.0] * 3, [0.0] * 3])
    leaf, smooth = x.clone().requires_grad_(), JpegSettings()
    last = x.to(memory_format=torch.channels_last)
    straight = JpegSettings("444", rounding="ste")
    boxes = JpegSettings(rounding="none", upsample="box", integer_planes=True, clamp_grad=0.5)
    return {
        "jpeg": [
            JpegArguments(leaf, tables, affine, "smooth", smooth, torch.float32),
            JpegArguments(leaf, tables, affine, "smooth", JpegSettings(rounding="none"), torch.float32),
            JpegArguments(leaf, tables, affine, "exact", straight, torch.float32),
            JpegArguments(last, tables.clone().requires_grad_(), affine, "smooth", boxes, torch.float64),
        ],
        "jpeg_backward": [JpegGradientArguments(grad, x, tables, affine, smooth, table_grad=True)],
    }

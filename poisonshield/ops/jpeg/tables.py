"""Quantisation tables: the Annex K base tables of the JPEG standard and libjpeg's quality rule.

Row-major and not transposed: the luminance table is not symmetric, and a transposed copy of it is a common error.
"""

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops.check import check_tensor, is_number, kind, readable
from poisonshield.ops.jpeg.constants import kept

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def jpeg_tables(quality: Tensor | float | int, base: Tensor | None = None) -> Tensor:
    """The luminance and chrominance tables that libjpeg writes for each quality: int32 [B, 2, 8, 8], in 1..255.

    quality: number or [B], 1..100; outside it is clamped, as libjpeg does. base: [2, 8, 8] or [B, 2, 8, 8] in place of
    Annex K. For the gradient with respect to either, see `scaled_tables`. Raises TypeError for other kinds, ConfigError
    for NaN and tables outside 1..65535, ShapeError.
    """
    if not isinstance(quality, Tensor):
        if not is_number(quality):
            raise TypeError(f"quality is {kind(quality)}. Give a number or a tensor [B].")
        quality = torch.as_tensor(quality)
    check_tensor("quality", quality, "numbers from 1 to 100")
    if quality.dim() > 1:
        raise ShapeError(f"quality has shape {tuple(quality.shape)}. Give one number, or one each, [B].")
    if readable(quality) and bool(quality.isnan().any()):
        raise ConfigError(f"quality {quality.tolist()} has a NaN. Give numbers from 1 to 100.")
    return scaled_tables(quality, base).round().to(torch.int32)


def scaled_tables(quality: Tensor, base: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """`jpeg_tables` as float32 (float64 if an input is), differentiable: every floor passes gradients straight through.

    ds/dQ = -5000/Q^2 below 50, else -2; dq/ds = base/100 where the table is inside 1..255, else 0. device: where the
    tables are wanted, that of quality if None; a single quality on the CPU, [], goes there as a number, with no copy.
    """
    if base is not None:
        _check_base(base)
    dtype = torch.float64 if torch.float64 in (quality.dtype, None if base is None else base.dtype) else torch.float32
    q = quality.to(dtype).clamp(1, 100)
    if base is None:
        base = annex_k(dtype, device or q.device)
    scale = _floor(torch.where(q < 50, 5000 / q, 200 - 2 * q))
    scale = scale[:, None, None, None] if scale.dim() else scale
    tables = _floor((base.to(dtype) * scale + 50) / 100).clamp(1, 255)
    return tables if tables.dim() == 4 else tables[None]  # [B, 2, 8, 8]


@kept
def annex_k(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The standard's base tables, [2, 8, 8]."""
    return torch.tensor((LUMINANCE, CHROMINANCE), dtype=dtype, device=device)


def _check_base(base: Tensor) -> None:
    check_tensor("qtables", base, "numbers [2, 8, 8] or [B, 2, 8, 8]")
    if base.dim() not in (3, 4) or base.shape[-3:] != (2, 8, 8):
        raise ShapeError(f"qtables have shape {tuple(base.shape)}. Give (2, 8, 8), luminance first, or (B, 2, 8, 8).")
    if base.dtype == torch.bool or (readable(base) and not bool(((base >= 1) & (base <= 65535)).all())):
        raise ConfigError("qtables must lie in 1..65535 (before scaling by quality).")


def _floor(x: Tensor) -> Tensor:
    return x + (x.detach().floor() - x.detach()) if x.requires_grad else x.floor()

"""From what users give to what the op takes: names are checked, quality becomes tables, ranges become one affine map.

Numbers on a CUDA device are not looked at, so that nothing waits for it.
"""

from numbers import Real

import torch
from torch import Tensor

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops.jpeg.tables import scaled_tables

SUBSAMPLINGS = ("420", "444")
MODES = ("smooth", "exact")
ROUNDINGS = ("poly", "ste", "hard", "poly_ste", "fourier", "none")
UPSAMPLINGS = ("fancy", "box")


def check_pixels(x: Tensor, mode: str) -> None:
    """Raises TypeError or ShapeError for anything but RGB floats [B, 3, H, W], or uint8 in exact mode."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}. Give a tensor [B, 3, H, W].")
    if not x.is_floating_point() and not (x.dtype == torch.uint8 and mode == "exact"):
        raise TypeError(f"x is {x.dtype}. Give float pixels in [0, 1]; uint8 is for mode='exact'.")
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[1:]:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Give RGB pixels [B, 3, H, W] with H and W at least 1.")


def check_names(subsampling: str, mode: str, rounding: str, upsample: str) -> None:
    """Raises ValueError with the known names for an unknown one."""
    for name, value, known in (
        ("subsampling", subsampling, SUBSAMPLINGS),
        ("mode", mode, MODES),
        ("rounding", rounding, ROUNDINGS),
        ("upsample", upsample, UPSAMPLINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown. Known: {', '.join(known)}")


def tables_of(x: Tensor, quality: Tensor | float | int, qtables: Tensor | None, *, whole: bool) -> Tensor:
    """The scaled tables of each sample, [B, 2, 8, 8] on the device of x. whole: for libjpeg's whole qualities."""
    quality = _quality_tensor(x, quality, whole)  # [], [1] or [B]
    if qtables is not None:
        _check_qtables(x, qtables)
    if whole:
        quality = quality.floor() if quality.is_floating_point() else quality
    tables = scaled_tables(quality if quality.is_floating_point() else quality.float(), qtables)
    return tables.expand(len(x), 2, 8, 8)


def _quality_tensor(x: Tensor, quality: Tensor | float | int, whole: bool) -> Tensor:
    if isinstance(quality, Real) and not isinstance(quality, bool):
        _check_quality(quality, whole)
        return torch.full((1,), quality, dtype=torch.float32, device=x.device)
    if not isinstance(quality, Tensor):
        raise TypeError(f"quality is a {type(quality).__name__}. Give a number or a tensor [B].")
    if quality.is_complex() or quality.dtype == torch.bool:
        raise TypeError(f"quality is {quality.dtype}. Give numbers from 1 to 100.")
    if quality.dim() > 1 or (quality.dim() == 1 and len(quality) not in (1, len(x))):
        raise ShapeError(f"quality has shape {tuple(quality.shape)} for {len(x)} images. Give one number, or one each.")
    if quality.device.type == "cpu":
        if not torch.compiler.is_compiling():
            for q in quality.detach().reshape(-1).tolist():
                _check_quality(q, whole)
    elif quality.device != x.device:
        raise ValueError(f"quality is on {quality.device} and x on {x.device}. Move one of them.")
    return quality.to(x.device)


def _check_quality(quality: float, whole: bool) -> None:
    if not 0 <= quality <= 100:
        raise ValueError(f"quality {quality} is outside 1..100 (0 counts as 1).")
    if whole and quality != int(quality):
        raise ValueError(f"quality {quality} is not whole. libjpeg knows whole qualities only; use mode='smooth'.")


def _check_qtables(x: Tensor, qtables: Tensor) -> None:
    if qtables.device != x.device:
        raise ValueError(f"qtables are on {qtables.device} and x on {x.device}. Move one of them.")
    if qtables.dim() == 4 and len(qtables) not in (1, len(x)):
        raise ShapeError(f"qtables are for {len(qtables)} images and x has {len(x)}.")
    if qtables.device.type == "cpu" and not torch.compiler.is_compiling() and qtables.numel():
        if not (qtables.min() >= 1 and qtables.max() <= 65535):
            raise ValueError("qtables must lie in 1..65535 (before scaling by quality).")


def affine_of(x: Tensor, value_range: tuple[float, float], mean: Tensor | None, std: Tensor | None) -> Tensor:
    """[2, 3]: pixel in 0..255 = x * affine[0] + affine[1], per channel."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither.")
    low, high = value_range
    if not high > low:
        raise ValueError(f"value_range {value_range} is empty. Give (low, high) with low < high.")
    if x.dtype == torch.uint8:
        if mean is not None or tuple(value_range) != (0.0, 1.0):
            raise ValueError("uint8 pixels are 0..255 already: leave value_range, mean and std alone.")
        return torch.stack((x.new_ones(3, dtype=torch.float32), x.new_zeros(3, dtype=torch.float32)))
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean is None or std is None:
        scale = torch.full((3,), 255 / (high - low), dtype=dtype, device=x.device)
        return torch.stack((scale, scale * -low))
    for name, value in (("mean", mean), ("std", std)):
        if not isinstance(value, Tensor) or value.numel() != 3:
            raise ShapeError(f"{name} must be a tensor of 3 numbers, one per channel.")
        if value.requires_grad and torch.is_grad_enabled():
            raise GradientError(f"{name} requires gradients, and none would reach it. Give {name}.detach().")
    mean, std = (v.reshape(3).to(x.device, dtype) for v in (mean, std))
    if std.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((std > 0).all()):
        raise ValueError(f"std {std.tolist()} must be positive.")
    return torch.stack((std, mean - low)) * (255 / (high - low))

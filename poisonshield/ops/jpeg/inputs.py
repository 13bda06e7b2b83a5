"""From what users give to what the op takes: names are checked, quality becomes tables, ranges become one affine map.

Numbers on a CUDA device are not looked at, so that nothing waits for it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops.check import (
    FLOATS,
    bring,
    check_choice,
    check_interval,
    check_number,
    check_tensor,
    is_number,
    kind,
    readable,
    statistics,
)
from poisonshield.ops.jpeg.reference import JpegSettings
from poisonshield.ops.jpeg.tables import scaled_tables

SUBSAMPLINGS = ("420", "444")
MODES = ("smooth", "exact")
ROUNDINGS = ("poly", "ste", "hard", "poly_ste", "fourier", "none")
UPSAMPLINGS = ("fancy", "box")


def check_pixels(x: Tensor, mode: str) -> None:
    """Raises TypeError or ShapeError for anything but RGB floats [B, 3, H, W], or uint8 in exact mode."""
    check_tensor("x", x, "a tensor [B, 3, H, W]")
    if x.dtype not in FLOATS and not (x.dtype == torch.uint8 and mode == "exact"):
        raise TypeError(f"x is {x.dtype}. Give float pixels in [0, 1]; uint8 is for mode='exact'.")
    if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[1:]:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Give RGB pixels [B, 3, H, W] with H and W at least 1.")


def check_settings(settings: JpegSettings, mode: str) -> None:
    """Raises TypeError or ConfigError for settings that do not exist or do not go together."""
    check_choice("subsampling", settings.subsampling, SUBSAMPLINGS)
    check_choice("mode", mode, MODES)
    check_choice("rounding", settings.rounding, ROUNDINGS)
    check_choice("upsample", settings.upsample, UPSAMPLINGS)
    if mode == "exact" and settings.upsample == "box":
        raise ConfigError("mode='exact' decodes as libjpeg does, with upsample='fancy'; 'box' needs mode='smooth'.")
    if mode == "exact" and settings.integer_planes:
        raise ConfigError("integer_planes is for mode='smooth'; exact mode stores integers already.")
    check_number("clamp_grad", settings.clamp_grad, least=0, most=1)
    check_number("fourier_terms", settings.fourier_terms, least=1, whole=True)


def check_space(value_range: tuple[float, float]) -> None:
    """Raises TypeError or ConfigError for anything but two finite numbers, low before high."""
    check_interval("value_range", value_range)
    low, high = value_range
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"value_range {value_range} is empty or endless. Give finite (low, high) with low < high.")


def tables_of(x: Tensor, quality: Tensor | float | int, qtables: Tensor | None, *, whole: bool) -> Tensor:
    """The scaled tables of each sample, [B, 2, 8, 8] on the device of x. whole: for libjpeg's whole qualities."""
    quality = _quality_tensor(x, quality, whole)  # [], [1] or [B]; on the CPU where it is a number of Python
    if qtables is not None:
        check_tensor("qtables", qtables, "numbers [2, 8, 8] or [B, 2, 8, 8]")
        if qtables.device != x.device:
            raise ConfigError(f"qtables are on {qtables.device} and x on {x.device}. Move one of them.")
        if qtables.dim() == 4 and qtables.shape[0] not in (1, x.shape[0]):
            raise ShapeError(f"qtables are for {qtables.shape[0]} images and x has {x.shape[0]}.")
    if whole:
        quality = quality.floor() if quality.is_floating_point() else quality
    tables = scaled_tables(quality if quality.is_floating_point() else quality.float(), qtables, x.device)
    return tables.expand(x.shape[0], 2, 8, 8)


def check_quality(quality: Any, whole: bool) -> None:
    """Raises TypeError or ConfigError for a quality of Python that JPEG does not have. whole: libjpeg's are."""
    if not is_number(quality):
        raise TypeError(f"quality is {kind(quality)}. Give a number from 1 to 100, or a tensor [B].")
    if not 0 <= quality <= 100:
        raise ConfigError(f"quality {quality} is outside 1..100 (0 counts as 1).")
    if whole and quality != int(quality):
        raise ConfigError(f"quality {quality} is not whole. libjpeg knows whole qualities only; use mode='smooth'.")


def _quality_tensor(x: Tensor, quality: Tensor | float | int, whole: bool) -> Tensor:
    if not isinstance(quality, Tensor):
        check_quality(quality, whole)
        # Arithmetic on a number costs a GPU nothing; compiled code keeps to one device.
        device = x.device if torch.compiler.is_compiling() else None
        return torch.full((), quality, dtype=torch.float32, device=device)
    check_tensor("quality", quality, "numbers from 1 to 100")
    if quality.dtype == torch.bool:
        raise TypeError(f"quality is {quality.dtype}. Give numbers from 1 to 100.")
    if quality.dim() > 1 or (quality.dim() == 1 and quality.shape[0] not in (1, x.shape[0])):
        raise ShapeError(
            f"quality has shape {tuple(quality.shape)} for {x.shape[0]} images. Give one number, or one each."
        )
    if readable(quality):
        for q in quality.detach().reshape(-1).tolist():
            check_quality(q, whole)
    return bring(x, quality, "quality", owner="x")


def affine_of(x: Tensor, value_range: tuple[float, float], mean: Tensor | None, std: Tensor | None) -> Tensor:
    """[2, 3]: pixel in 0..255 = x * affine[0] + affine[1], per channel."""
    check_space(value_range)
    low, high = value_range
    normalized = statistics(x, mean, std, channels=3, owner="x")
    if x.dtype == torch.uint8:
        if normalized is not None or tuple(value_range) != (0.0, 1.0):
            raise ConfigError("uint8 pixels are 0..255 already: leave value_range, mean and std alone.")
        return torch.stack((x.new_ones(3, dtype=torch.float32), x.new_zeros(3, dtype=torch.float32)))
    if normalized is None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        affine = torch.full((2, 3), 255 / (high - low), dtype=dtype, device=x.device)
        affine[1].mul_(-low)
        return affine
    mean, std = normalized
    return torch.stack((std, mean - low)) * (255 / (high - low))

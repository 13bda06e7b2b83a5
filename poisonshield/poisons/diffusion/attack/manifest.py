"""What a poisoned picture's manifest says: how it was made, and what was measured on its pixels."""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from poisonshield import __version__
from poisonshield.errors import BudgetError
from poisonshield.poisons.diffusion.base import DiffusionPoison


def measure_change(source: Tensor, result: Tensor) -> dict[str, Any]:
    """The change from source to result, both uint8 [3, H, W], in levels of 8 bits.

    max, mean_abs, rms, l2 (Euclidean length); psnr_db (None for no change); clipped_share: values of the result at 0 or
    255; changed_share: values that differ.
    """
    change = result.to(torch.int64) - source.to(torch.int64)
    mse = float(change.double().square().mean())
    return {
        "max": int(change.abs().max()),
        "mean_abs": float(change.double().abs().mean()),
        "rms": math.sqrt(mse),
        "l2": math.sqrt(mse * change.numel()),
        "psnr_db": 10 * math.log10(255**2 / mse) if mse else None,
        "clipped_share": float(((result == 0) | (result == 255)).double().mean()),
        "changed_share": float((change != 0).double().mean()),
    }


def check_budget(poison: DiffusionPoison, key: str, source: Tensor, result: Tensor) -> dict[str, Any]:
    """What `measure_change` measures. Raises BudgetError if the picture's size changed or its budget does not hold."""
    if source.shape != result.shape:
        raise BudgetError(f"picture {key} became {list(result.shape)} from {list(source.shape)}.")
    measured, eps = measure_change(source, result), poison.config.eps_levels
    size = measured["max"] if poison.config.norm == "linf" else measured["rms"]
    if size > eps:
        raise BudgetError(f"picture {key} differs by {size:g} levels ({poison.config.norm}), and {eps:g} were allowed.")
    return measured


def manifest(
    poison: DiffusionPoison, key: str, source: Tensor, result: Tensor, *, preset: str | None = None
) -> dict[str, Any]:
    """The record of one picture, plain data: recipe, model, measured change, hashes of both pictures' pixels.

    Raises BudgetError if the budget does not hold.
    """
    said = poison.describe()
    return {
        "format": "poisonshield-protected/1",
        "key": key,
        "method": said["name"],
        "preset": preset,
        **{name: said[name] for name in ("config", "seed", "prompt", "steps", "model")},
        "budget": {"norm": poison.config.norm, "eps_levels": poison.config.eps_levels},
        "measured": check_budget(poison, key, source, result),
        "size": {"height": source.shape[1], "width": source.shape[2]},
        "source_pixels_sha256": pixels_hash(source),
        "pixels_sha256": pixels_hash(result),
        "versions": {"poisonshield": __version__, "torch": torch.__version__},
    }


def pixels_hash(pixels: Tensor) -> str:
    """SHA-256 of uint8 [3, H, W] in row-major order of [H, W, 3], as image libraries hold them."""
    return hashlib.sha256(pixels.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()).hexdigest()

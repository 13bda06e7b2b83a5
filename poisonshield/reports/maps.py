"""Sensitivity maps over their pictures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.models.diffusion.sensitivity import Sensitivity

Norm = Literal["joint", "self", "sum1"]
NORMS = ("joint", "self", "sum1")

_ENLARGE = 8
_CLIP = 0.99  # quantile of a map's values that is the end of its scale


def scale_maps(maps: Tensor, norm: Norm, *, signed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(maps, low, high) of maps [P, T, h, w] of one picture in P versions: what to draw, and its scale [P, T].

    joint: one scale for all versions at a timestep, from the least value to the 99th percentile, so that they compare.
    self: every map by its own, which shows shapes only. sum1: each map is divided by its sum (of sizes, if signed)
    first, then as joint: where the share went. signed: from -high to high.
    """
    if norm == "sum1":
        maps = maps / maps.abs().sum((2, 3), keepdim=True).clamp(min=1e-30)
    values = maps.abs() if signed else maps
    together = values.flatten(2) if norm == "self" else values.transpose(0, 1).flatten(1).expand(len(maps), -1, -1)
    high = together.quantile(_CLIP, dim=2)
    low = -high if signed else together.amin(2)
    # A map without any structure has no scale; any one shows it flat.
    return maps, low, torch.where(high > low, high, low + 1e-12)


def draw_maps(
    path: Path,
    sets: Mapping[str, tuple[Tensor, Tensor]],
    *,
    timesteps: Sequence[int],
    mode: str,
    norm: Norm = "joint",
) -> Path:
    """One PNG: a row for each set with its picture [3, H, W] and its maps [T, h, w], laid over the picture in grey."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    signed = mode == "signed"
    maps, low, high = scale_maps(torch.stack([m for _, m in sets.values()]), norm, signed=signed)
    colours = "coolwarm" if signed else "inferno"
    count, columns = len(sets), 1 + len(timesteps)
    figure = Figure(figsize=(1.9 * columns, 2.1 * count + 0.6), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    for p, (name, (picture, _)) in enumerate(sets.items()):
        extent = (-0.5, picture.shape[2] - 0.5, picture.shape[1] - 0.5, -0.5)
        axes[p, 0].imshow(picture.permute(1, 2, 0).numpy())
        axes[p, 0].set_ylabel(name)
        large = F.interpolate(maps[p][None], scale_factor=_ENLARGE, mode="bicubic", align_corners=False)[0]
        for t, timestep in enumerate(timesteps):
            axis = axes[p, 1 + t]
            axis.imshow(picture.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
            scale = Normalize(float(low[p, t]), float(high[p, t]))
            axis.imshow(large[t].numpy(), cmap=colours, norm=scale, alpha=0.65, extent=extent)
            if p == 0:
                axis.set_title(f"t = {timestep}", fontsize=9)
            if norm == "self" or p == count - 1:
                shown = axis if norm == "self" else list(axes[:, 1 + t])
                bar = figure.colorbar(ScalarMappable(scale, colours), ax=shown, location="bottom", shrink=0.9)
                bar.ax.tick_params(labelsize=6)
                bar.locator, bar.formatter = _make_ticks()
                bar.update_ticks()
    for axis in axes.flat:
        axis.set_xticks([], [])
        axis.set_yticks([], [])
    figure.suptitle(f"{mode}, scale: {norm}", fontsize=9)
    figure.savefig(path, dpi=110)
    return path


def draw_totals(path: Path, found: Mapping[str, Sensitivity]) -> Path:
    """One PNG: the sum of each map by timestep, and the concept's share where there are masks; mean and range."""
    from matplotlib.figure import Figure

    panels = {"sum of the map": {k: s.total for k, s in found.items()}}
    shares = {k: s.concept_share for k, s in found.items() if s.concept_share is not None}
    if len(shares) == len(found):
        panels["concept share / area share"] = shares
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            values, t = values.cpu(), next(iter(found.values())).timesteps
            axis.plot(t, values.mean(0), marker="o", label=name)
            axis.fill_between(t, values.amin(0), values.amax(0), alpha=0.2)
        if title == "sum of the map" and all(float(v.min()) > 0 for v in curves.values()):
            axis.set_yscale("log")
        axis.set(xlabel="timestep", title=title)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _make_ticks() -> tuple[Any, Any]:
    """matplotlib's locator and formatter of few ticks."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 3))
    return MaxNLocator(3), formatter

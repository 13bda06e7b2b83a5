"""Pictures on disk: one PNG each, and sheets with a named row for each set."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from poisonshield.errors import ShapeError

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 8


def write_pictures(folder: Path, pictures: Mapping[str, Mapping[str, Tensor]]) -> None:
    """`<folder>/<concept>/<group>-000.png` of pixels [N, 3, H, W] in [0, 1], rounded to 8 bits; what was there goes."""
    if folder.is_dir():
        shutil.rmtree(folder)
    for name, groups in pictures.items():
        for group, x in groups.items():
            for i, picture in enumerate(x):
                path = folder / name / f"{group}-{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                to_image(picture).save(path)


def to_image(x: Tensor) -> "Image.Image":
    """The Pillow image of pixels [3, H, W] in [0, 1]."""
    from PIL import Image

    if x.dim() != 3 or x.shape[0] != 3:
        raise ShapeError(f"a picture has shape {tuple(x.shape)}; [3, H, W] is wanted.")
    return Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def draw_sheet(
    path: Path,
    rows: Mapping[str, Tensor | Sequence[Tensor]],
    *,
    columns: int = _COLUMNS,
    inches: float = 1.1,
    title: str | None = None,
) -> Path:
    """One PNG: a row for each name with its first pictures [3, H, W] in [0, 1], `inches` wide at 90 dots an inch."""
    from matplotlib.figure import Figure

    wide = min(columns, max(len(x) for x in rows.values()))
    figure = Figure(figsize=(wide * inches + 2.2, len(rows) * inches + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), wide, squeeze=False)
    for line, (name, x) in zip(axes, rows.items(), strict=True):
        for i, axis in enumerate(line):
            axis.set_xticks([], [])
            axis.set_yticks([], [])
            axis.set_frame_on(False)
            if i < len(x):
                axis.imshow(numpy.asarray(to_image(x[i])), interpolation="nearest")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    return path

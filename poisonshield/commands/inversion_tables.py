"""What a grid of textual inversions ends in: how much each defense brings back, what it costs, and one picture sheet."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from poisonshield.commands.pictures import draw_sheet

READOUTS = {
    "fidelity": "fidelity",
    "shown": "concept shown, %",
    "distance": "distance to real",
    "latent_cosine": "latent cosine",
    "high_frequency": "high-frequency ratio",
    "vector_cosine": "cosine to clean vector",
}
"""Numbers of a result row and what tables call them. fidelity to distance exist for the rendered world only."""

_NONE = ("none", "clean")


def table(places: Sequence[tuple[dict[str, str], list[dict[str, Any]]]]) -> str:
    """Recovery and clean cost by fidelity where the grid has the axes `poison` and `defense` with a `none` on each.

    recovery = (defended - undefended) / (clean - undefended) on poisoned data, clean cost = undefended - defended on clean
    data; means over seeds and concepts. Where the poison costs nothing there is nothing to recover, and "-" stands.
    """
    value: dict[tuple[str, str], float] = {}
    for labels, rows in places:
        known = [r["fidelity"] for r in rows if r.get("fidelity") is not None]
        if {"poison", "defense"} <= set(labels) and known:
            value[labels["poison"], labels["defense"]] = mean(known)
    poisons = list(dict.fromkeys(p for p, _ in value))
    defenses = list(dict.fromkeys(d for _, d in value))
    clean = next((p for p in poisons if p in _NONE), None)
    if clean is None or "none" not in defenses or len(poisons) < 2:
        return ""
    head = ["defense", "clean cost", *(f"recovery, {p}" for p in poisons if p != clean)]
    lines = [head, ["---"] * len(head)]
    ceiling = value.get((clean, "none"))
    for defense in defenses:
        cost = _difference(ceiling, value.get((clean, defense)))
        line = [defense, "-" if cost is None else f"{cost:.2f}"]
        for poison in (p for p in poisons if p != clean):
            gained = _difference(value.get((poison, defense)), value.get((poison, "none")))
            lost = _difference(ceiling, value.get((poison, "none")))
            line.append("-" if gained is None or lost is None or lost <= 0.02 else f"{gained / lost:.2f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def draw_grid(path: Path, runs: Sequence[tuple[dict[str, str], int, Path]], *, columns: int = 10) -> Path | None:
    """One sheet: a row for each place of the grid, with pictures of its first finished seed. None if there are none."""
    rows: dict[str, Tensor] = {}
    for labels, _, folder in runs:
        name = ", ".join(labels.values())
        files = sorted(folder.glob("pictures/*/recon-*.png"))[:columns]
        if files and name not in rows:
            rows[name] = torch.stack([read_picture(file) for file in files])
    return draw_sheet(path, rows, columns=columns) if rows else None


def read_picture(path: Path) -> Tensor:
    """Pixels float32 [3, H, W] in [0, 1] of a picture file."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255

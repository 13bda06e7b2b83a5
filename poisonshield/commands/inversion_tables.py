"""What a grid of textual inversions ends in: how much each defense brings back, what it costs, and one picture sheet."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.commands.pictures import draw_sheet
from poisonshield.evals.recovery import clean_cost, recovery

READOUTS = {
    "fidelity": "fidelity",
    "shown": "shown, %",
    "feature_distance": "feature distance",
    "color_distance": "colour distance",
    "latent_cosine": "latent cosine",
    "high_frequency": "high frequencies",
}
"""Numbers of a result row and what tables call them: see reading.measure."""

_NONE = ("none", "clean")


def table(places: Sequence[tuple[dict[str, str], list[dict[str, Any]]]]) -> str:
    """Recovery and clean cost by fidelity where the grid has the axes `poison` and `defense` with a `none` on each.

    Each concept and seed counts as one, with a bootstrap interval over them. Where a poison's damage is within its own
    interval of nothing, there is nothing to recover, and "-" stands.
    """
    value: dict[tuple[str, str], dict[str, float]] = {}
    for labels, rows in places:
        known = {f"{r['concept']}/{r['seed']}": r["fidelity"] for r in rows if r.get("fidelity") is not None}
        if {"poison", "defense"} <= set(labels) and known:
            value[labels["poison"], labels["defense"]] = known
    poisons = list(dict.fromkeys(p for p, _ in value))
    clean = next((p for p in poisons if p in _NONE), None)
    if clean is None or (clean, "none") not in value or len(poisons) < 2:
        return ""
    others = [p for p in poisons if p != clean]
    head = ["defense", "clean cost", *(f"recovery, {p}" for p in others)]
    lines, ceiling = [head, ["---"] * len(head)], value[clean, "none"]
    for defense in dict.fromkeys(d for _, d in value):
        line = [defense, _told(_common(clean_cost, ceiling, value.get((clean, defense))))]
        for poison in others:
            bare, defended = value.get((poison, "none")), value.get((poison, defense))
            line.append(_told(_common(recovery, ceiling, bare, defended)))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _common(of: Callable[..., dict[str, Any]], *tables: dict[str, float] | None) -> dict[str, Any] | None:
    """The measure over the concepts and seeds that all tables have; None if one has none."""
    if any(t is None for t in tables):
        return None
    keys = sorted(set.intersection(*(set(t) for t in tables)))
    return of(*({k: t[k] for k in keys} for t in tables)) if keys else None


def _told(measured: dict[str, Any] | None) -> str:
    if measured is None or "value" not in measured:
        return "-"
    text = f"{measured['value']:.2f}"
    return text if measured["low"] is None else f"{text} ({measured['low']:.2f} to {measured['high']:.2f})"


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

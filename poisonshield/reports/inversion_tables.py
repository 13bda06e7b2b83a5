"""What textual inversions end in: a line for each concept, what a grid's defenses bring back and cost, one picture sheet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.evals.diffusion.learned_words import word_distance
from poisonshield.evals.diffusion.parts.recovery import by_group, clean_cost, recovery
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.reports.sheets import draw_sheet

READOUTS = {
    "fidelity": "fidelity",
    "shown": "shown, %",
    "feature_distance": "feature distance",
    "color_distance": "colour distance",
    "latent_cosine": "latent cosine",
    "high_frequency": "high frequencies",
}
"""Numbers of a result row and what tables call them: see reading.measure."""

FOLD = "data.left_out"
"""An axis of a grid that repeats a run with other pictures left out: tables take its runs together, as they do seeds."""

_WHERE_KNOWN = {
    "brisque": "BRISQUE",
    "mask_area": "mask area",
    "mask_iou": "mask IoU",
    "word_cosine": "cosine to clean word",
    "word_l2": "distance to clean word",
}
_EFFECT_BY = ("fidelity", "dino_i", "clip_i", "latent_cosine")  # the first that is known; higher is better in each
_CLEAN = ("none", "clean")


@dataclass(frozen=True)
class LearnedRun:
    """A run of a grid: its place on each axis, its seed, its rows of results, and the embedding file of a concept."""

    labels: Mapping[str, str]
    seed: int
    rows: list[dict[str, Any]]
    file_of: Callable[[str], Path]


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result row with the scores of feature networks, where there are any, beside its other numbers."""
    networks = row.get("networks") or {}
    return {**row, **{k: told["value"] for k, told in networks.items() if told["status"] == "ok"}}


def readouts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which numbers of these flat rows tables show, and what they call them: some always, others where any row has one."""
    known = {k for row in rows for k, v in row.items() if v is not None}
    scores = {k for row in rows for k in row.get("networks") or {} if k in known}
    return {
        **READOUTS,
        **{k: name for k, name in _WHERE_KNOWN.items() if k in known},
        **{k: k.replace("_", " ") for k in sorted(scores)},
    }


def concept_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of one run: a line for each concept, with the vocabulary's word nearest to each of its vectors."""
    rows = [flat(row) for row in rows]
    names = readouts(rows)
    lines = [["concept", "group", *names.values(), "nearest words"]]
    for row in rows:
        numbers = ("-" if row.get(k) is None else f"{row[k]:.4g}" for k in names)
        nearest = ", ".join(words[0][0] for words in row["word"]["nearest"])
        lines.append([row["concept"], row["group"] or "-", *numbers, nearest])
    return _markdown(lines)


def table(places: Sequence[tuple[Mapping[str, str], list[dict[str, Any]]]]) -> str:
    """Recovery and clean cost where the grid has the axes `poison` and `defense` with a clean and a `none` on each.

    Rows are flat. A grid's other axes make tables of their own; concepts in and out of distribution also stand apart.
    Each concept, seed and left-out picture counts as one, with a bootstrap interval over them. Where a poison's damage
    is within its own interval of nothing, there is nothing to recover, and "-" stands.
    """
    by = next((k for k in _EFFECT_BY for _, rows in places for row in rows if row.get(k) is not None), None)
    apart: dict[tuple, list[tuple[Mapping[str, str], list[dict[str, Any]]]]] = {}
    for labels, rows in places:
        if {"poison", "defense"} <= set(labels):
            rest = tuple((axis, label) for axis, label in labels.items() if axis not in ("poison", "defense"))
            apart.setdefault(rest, []).append((labels, rows))
    parts = []
    for rest, inside in apart.items():
        if text := _effect(inside, by):
            parts += [", ".join(f"{axis}: {label}" for axis, label in rest)] if rest else []
            parts.append(text)
    if not parts:
        return ""
    return "\n\n".join(
        [
            *parts,
            f"By {readouts([r for _, rows in places for r in rows])[by]}, over concepts and seeds, with 95 % bootstrap intervals. "
            "Clean cost: what a defense takes where there is no poison. Recovery: the share of a poison's damage that it "
            "brings back; - where no damage is sure.",
        ]
    )


def _effect(places: Sequence[tuple[Mapping[str, str], list[dict[str, Any]]]], by: str | None) -> str:
    """The lines of one table, "" where the grid has not the runs for it."""
    value: dict[tuple[str, str], dict[str, float]] = {}
    groups: dict[str, str | None] = {}
    for labels, rows in places:
        for row in rows:
            if row.get(by) is not None:
                key = f"{row['concept']}/{row['seed']}/{row.get('left_out')}"
                value.setdefault((labels["poison"], labels["defense"]), {})[key] = row[by]
                groups[key] = row.get("group")
    poisons = list(dict.fromkeys(p for p, _ in value))
    clean = next((p for p in poisons if p in _CLEAN), None)
    if clean is None or (clean, "none") not in value or len(poisons) < 2:
        return ""
    others = [p for p in poisons if p != clean]
    names = sorted({g for g in groups.values() if g is not None})
    split = ["all", *names] if len(names) > 1 else ["all"]
    of = lambda group, *place: by_group(value.get(place, {}), groups).get(group)
    lines = [["defense", *(["concepts"] if len(split) > 1 else []), "clean cost", *(f"recovery, {p}" for p in others)]]
    for defense in dict.fromkeys(d for _, d in value):
        for group in split:
            ceiling = of(group, clean, "none")
            cells = [_told(_common(clean_cost, ceiling, of(group, clean, defense)))]
            for poison in others:
                bare, defended = of(group, poison, "none"), of(group, poison, defense)
                cells.append(_told(_common(recovery, ceiling, bare, defended)))
            lines.append([defense, *([group] if len(split) > 1 else []), *cells])
    return _markdown(lines)


def _common(of: Callable[..., dict[str, Any]], *tables: Mapping[str, float] | None) -> dict[str, Any] | None:
    """The measure over the concepts and seeds that all tables have; None if one has none."""
    if any(t is None for t in tables):
        return None
    keys = sorted(set.intersection(*(set(t) for t in tables)))
    return of(*({k: t[k] for k in keys} for t in tables)) if keys else None


def _told(measured: dict[str, Any] | None) -> str:
    if measured is None or "value" not in measured:
        return "-"
    text = lambda key: f"{round(measured[key], 2) + 0:.2f}"  # no -0.00
    return text("value") if measured["low"] is None else f"{text('value')} ({text('low')} to {text('high')})"


def add_word_distances(runs: Sequence[LearnedRun]) -> None:
    """Writes word_cosine and word_l2 into the rows of runs whose clean counterpart is in the grid and has finished.

    That is the run of the same seed and the same place on all other axes with clean pictures and no defense: both
    learned from one start, so that what lies between their words is the poison's and the defense's doing.
    """
    clean = {_place(run): run for run in runs if run.rows and _is_clean(run.labels)}
    for run in runs:
        other = clean.get(_place(run))
        if other is None or other is run or not {"poison", "defense"} <= set(run.labels):
            continue
        for row in run.rows:
            files = [r.file_of(row["concept"]) for r in (run, other)]
            if all(file.is_file() for file in files):
                mine, theirs = (load_embedding(file).vectors for file in files)
                if mine.shape == theirs.shape:
                    row |= {f"word_{k}": round(v, 4) for k, v in word_distance(mine, theirs).items()}


def _place(run: LearnedRun) -> tuple:
    return run.seed, *sorted((k, v) for k, v in run.labels.items() if k not in ("poison", "defense"))


def _is_clean(labels: Mapping[str, str]) -> bool:
    return labels.get("poison") in _CLEAN and labels.get("defense") == "none"


def draw_grid(path: Path, runs: Sequence[tuple[Mapping[str, str], Path]], *, columns: int = 10) -> Path | None:
    """One sheet: a row for each place of the grid, with pictures of its first finished run. None if there are none."""
    rows: dict[str, Tensor] = {}
    for labels, folder in runs:
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


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))

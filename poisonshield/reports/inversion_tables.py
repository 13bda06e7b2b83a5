"""What textual inversions end in: a line for each concept, what a grid's defenses bring back and cost, a sheet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.data.pictures import read_picture
from poisonshield.evals.base import Number
from poisonshield.evals.diffusion import EVALUATIONS
from poisonshield.evals.diffusion.parts.recovery import by_group, clean_cost, recovery
from poisonshield.evals.diffusion.word import word_distance
from poisonshield.evals.parts.numbers import columns_of, numbers_of
from poisonshield.models.diffusion.embeddings import load_embedding
from poisonshield.reports.sheets import draw_sheet
from poisonshield.reports.tables import markdown

OF_RUNS = (
    Number("mask_area", "mask area", column="known"),
    Number("mask_iou", "mask IoU", better="higher", column="known"),
    Number("word_cosine", "cosine to clean word", better="higher", column="known"),
    Number("word_l2", "distance to clean word", better="lower", column="known"),
)
"""Numbers of a row that no evaluation gives: of the masks of a defense, and of the word beside the clean run's."""

_CLEAN = ("none", "clean")

Place = tuple[Mapping[str, str], Sequence[Mapping[str, Any]]]
"""Where runs stand on each axis of a grid, and their flat rows."""


@dataclass(frozen=True)
class LearnedRun:
    """A run of a grid: its place on each axis, its seed, its rows of results, and the embedding file of a concept."""

    labels: Mapping[str, str]
    seed: int
    rows: list[dict[str, Any]]
    file_of: Callable[[str], Path]


@dataclass(frozen=True)
class Effects:
    """One number of all runs of a table: {(poison, defense): {sample: value}}, a sample being a concept, a seed and a
    left-out picture together; and the group of each sample, such as "id"."""

    number: Number
    values: Mapping[tuple[str, str], Mapping[str, float]]
    groups: Mapping[str, str | None]

    @classmethod
    def of(cls, number: Number, places: Sequence[Place]) -> "Effects":
        """Of places with the axes `poison` and `defense`; rows without the number do not count."""
        values: dict[tuple[str, str], dict[str, float]] = {}
        groups: dict[str, str | None] = {}
        for labels, rows in places:
            for row in rows:
                if row.get(number.key) is not None:
                    sample = f"{row['concept']}/{row['seed']}/{row.get('left_out')}"
                    values.setdefault((labels["poison"], labels["defense"]), {})[sample] = row[number.key]
                    groups[sample] = row.get("group")
        return cls(number, values, groups)

    @property
    def poisons(self) -> list[str]:
        """In the order of the grid."""
        return list(dict.fromkeys(poison for poison, _ in self.values))

    @property
    def defenses(self) -> list[str]:
        """In the order of the grid."""
        return list(dict.fromkeys(defense for _, defense in self.values))

    @property
    def parts(self) -> list[str]:
        """What lines are made for: all concepts, and each group where there are several."""
        names = sorted({group for group in self.groups.values() if group is not None})
        return ["all", *names] if len(names) > 1 else ["all"]

    def at(self, poison: str, defense: str, part: str) -> Mapping[str, float] | None:
        """{sample: value} of one part of the concepts at one place; None if there is none."""
        return by_group(self.values.get((poison, defense), {}), self.groups).get(part)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result row with the scores of feature networks, where there are any, beside its other numbers."""
    scores = {key: score["value"] for key, score in (row.get("networks") or {}).items() if score["status"] == "ok"}
    return {**scores, **{key: value for key, value in row.items() if value is not None or key not in scores}}


def columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Number, ...]:
    """The numbers that tables of these flat rows show: of evaluations, of runs, and of other feature networks."""
    declared = (*numbers_of(EVALUATIONS), *OF_RUNS)
    others = {key for row in rows for key in row.get("networks") or {}} - {number.key for number in declared}
    scores = (Number(key, key.replace("_", " "), column="known") for key in sorted(others))
    return columns_of((*declared, *scores), rows)


def concept_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of one run: a line for each concept, with the word nearest to each of its vectors."""
    rows = [flat(row) for row in rows]
    numbers = columns(rows)
    lines = []
    for row in rows:
        cells = [number.write(row.get(number.key), more=1) for number in numbers]
        nearest = ", ".join(words[0][0] for words in (row.get("word") or {"nearest": ()})["nearest"])
        lines.append([row["concept"], row["group"] or "-", *cells, nearest])
    return markdown(["concept", "group", *(number.title for number in numbers), "nearest words"], *lines)


def table(places: Sequence[Place]) -> str:
    """Recovery and clean cost where the grid has the axes `poison` and `defense` with a clean and a `none` on each.

    Rows are flat. A grid's other axes make tables of their own; concepts in and out of distribution also stand apart.
    Each concept, seed and left-out picture counts as one, with a bootstrap interval over them. Where a poison's damage
    is within its own interval of nothing, there is nothing to recover, and "-" stands.
    """
    number = _telling([row for _, rows in places for row in rows])
    if number is None:
        return ""
    parts = []
    for rest, inside in _apart(places).items():
        if text := _effect_table(Effects.of(number, inside)):
            parts += [", ".join(f"{axis}: {label}" for axis, label in rest)] if rest else []
            parts.append(text)
    if parts:
        parts.append(
            f"By {number.label}, over concepts and seeds, with 95 % bootstrap intervals. Clean cost: what a defense "
            "takes where there is no poison. Recovery: the share of a poison's damage that it brings back; - where no "
            "damage is sure."
        )
    return "\n\n".join(parts)


def _telling(rows: Sequence[Mapping[str, Any]]) -> Number | None:
    """The number that effects are read off: of those that are known, the one with the smallest `effect`."""
    known = [n for n in numbers_of(EVALUATIONS) if n.effect is not None and any(r.get(n.key) is not None for r in rows)]
    return min(known, key=lambda n: n.effect or 0, default=None)


def _apart(places: Sequence[Place]) -> dict[tuple[tuple[str, str], ...], list[Place]]:
    """{labels on other axes: places}, of those places that have the axes `poison` and `defense`."""
    apart: dict[tuple[tuple[str, str], ...], list[Place]] = {}
    for labels, rows in places:
        if {"poison", "defense"} <= set(labels):
            rest = tuple((axis, label) for axis, label in labels.items() if axis not in ("poison", "defense"))
            apart.setdefault(rest, []).append((labels, rows))
    return apart


def _effect_table(effects: Effects) -> str:
    """A line for each defense and part of the concepts; "" where the grid has not the runs for it."""
    clean = next((poison for poison in effects.poisons if poison in _CLEAN), None)
    others = [poison for poison in effects.poisons if poison != clean]
    if clean is None or (clean, "none") not in effects.values or not others:
        return ""
    several = len(effects.parts) > 1
    lines = []
    for defense in effects.defenses:
        for part in effects.parts:
            recovered = [_recovery(effects, clean, poison, defense, part) for poison in others]
            place = [defense, part] if several else [defense]
            lines.append([*place, _clean_cost(effects, clean, defense, part), *recovered])
    head = ["defense", "concepts"] if several else ["defense"]
    return markdown([*head, "clean cost", *(f"recovery, {poison}" for poison in others)], *lines)


def _clean_cost(effects: Effects, clean: str, defense: str, part: str) -> str:
    cost = partial(clean_cost, higher_is_better=effects.number.better != "lower")
    return _write(_common(cost, effects.at(clean, "none", part), effects.at(clean, defense, part)))


def _recovery(effects: Effects, clean: str, poison: str, defense: str, part: str) -> str:
    places = ((clean, "none"), (poison, "none"), (poison, defense))
    return _write(_common(recovery, *(effects.at(*place, part) for place in places)))


def _common(of: Callable[..., dict[str, Any]], *tables: Mapping[str, float] | None) -> dict[str, Any] | None:
    """The measure over the concepts and seeds that all tables have; None if one has none."""
    known = [t for t in tables if t is not None]
    if len(known) < len(tables):
        return None
    keys = sorted(set.intersection(*(set(t) for t in known)))
    return of(*({k: t[k] for k in keys} for t in known)) if keys else None


def _write(measured: dict[str, Any] | None) -> str:
    if measured is None or "value" not in measured:
        return "-"
    value, low, high = (
        None if measured[key] is None else f"{round(measured[key], 2) + 0:.2f}"  # + 0: no -0.00
        for key in ("value", "low", "high")
    )
    return str(value) if low is None else f"{value} ({low} to {high})"


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


def draw_grid(path: Path, runs: Sequence[tuple[Mapping[str, str], Path]], *, columns: int = 10) -> Path:
    """One sheet at `path`: a row for each place of the grid, with pictures of its first finished run.

    Nothing is written where no run has pictures.
    """
    rows: dict[str, Tensor] = {}
    for labels, folder in runs:
        name = ", ".join(labels.values())
        files = sorted(folder.glob("pictures/*/recon-*.png"))[:columns]
        if files and name not in rows:
            rows[name] = torch.stack([read_picture(file).pixels.float() / 255 for file in files])
    if rows:
        draw_sheet(path, rows, columns=columns)
    return path

"""One file, many runs: every combination of settings, with seeds, resumed where it stopped, ending in one table.

A grid file names a base experiment and blocks of axes; a block is the product of its axes, and blocks stand side by
side, so that ablations which vary one thing at a time are one block each:

    base: ../defend/vespr_cifar10_mini.yaml        # relative to this file
    dir: runs/ablation
    seeds: [0, 1, 2]
    settings: {engine.epochs: 12}                  # for every run
    blocks:
      - defenses.0.eps: [0, 4/255, 8/255]          # an axis of values of one setting
        training:                                  # an axis of named groups of settings
          vespr: {}
          ssl+ce: {defenses.0.attack_views: []}

Every run is an ordinary run folder: a finished one is kept, an unfinished one goes on from its last checkpoint.
"""

import csv
import io
import itertools
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field, field_validator

from poisonshield.build import Run, read_run
from poisonshield.commands.invert import embedding_file
from poisonshield.commands.train import train
from poisonshield.config import Checker, Settings, load_tree
from poisonshield.engine.checkpoint import write_whole
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import ConfigError, PoisonShieldError
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.base import Number
from poisonshield.evals.parts.numbers import columns_of, numbers_of
from poisonshield.invert_config import InvertRun, is_invert, read_invert, token_of
from poisonshield.reports import inversion_tables
from poisonshield.reports.tables import spreads

log = logging.getLogger(__name__)


class GridConfig(Settings):
    """A grid file. dir: where the runs' folders and the table go."""

    base: str
    dir: str
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    settings: dict[str, Any] = {}
    blocks: tuple[dict[str, dict[str, dict[str, Any] | None] | list[Any]], ...] = Field(min_length=1)

    @field_validator("blocks")
    @classmethod
    def _axes_hold_something(cls, blocks: tuple[dict, ...]) -> tuple[dict, ...]:
        empty = [axis for block in blocks for axis, choices in block.items() if not choices]
        if empty:
            raise ValueError(f"the axis {empty[0]} is empty. Give it values, or remove it.")
        return blocks


@dataclass(frozen=True)
class Cell:
    """One run of the grid: where it stands on each axis, its seed, its folder and its checked settings.

    A classifier's run has one row of results, a textual inversion one for each concept.
    """

    labels: dict[str, str]
    seed: int
    overrides: tuple[str, ...]
    folder: RunFolder
    run: Run | InvertRun

    @property
    def inverts(self) -> bool:
        """Whether it is a textual inversion."""
        return isinstance(self.run, InvertRun)

    @property
    def place(self) -> dict[str, str]:
        """Its labels without those of repetitions, which tables take together."""
        return {axis: label for axis, label in self.labels.items() if axis != inversion_tables.FOLD}

    def file_of(self, concept: str) -> Path:
        """Where a textual inversion keeps the word of a concept."""
        return embedding_file(self.folder, token_of(self.run.settings.data, concept))

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of results.json; none while it has not finished."""
        if not self.folder.results.is_file():
            return []
        self.folder.check(self.run.record, resume="auto")  # raises if it was trained with other settings
        rows = json.loads(self.folder.results.read_text())
        return [inversion_tables.flat(row) for row in rows] if self.inverts else rows[-1:]


def read_grid(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> tuple[Path, list[Cell]]:
    """The grid's folder and all its runs, every one of them checked. Overrides change the grid file's own keys.

    Raises ConfigError for the grid file's mistakes, and for those of any run, named by its place in the grid.
    """
    tree = load_tree(path, overrides)
    checker = Checker(tree)
    config = checker.settings(GridConfig, (), tree.values, owner="a grid")
    checker.finish()
    base = Path(os.path.normpath(Path(path).parent / config.base))
    read = read_invert if is_invert(base) else read_run
    cells, known = [], {}
    for block in config.blocks:
        for picks in itertools.product(*(_choices(axis, choices) for axis, choices in block.items())):
            labels = dict(zip(block, (label for label, _ in picks), strict=True))
            changes = {k: v for _, settings in picks for k, v in settings.items()}
            place = _slug(labels)
            if known.setdefault(place, labels) is not labels:
                raise ConfigError(f"{path}: two runs are both called {place}. Name their axes or choices apart.")
            for seed in config.seeds:
                folder = Path(config.dir) / place / f"seed-{seed}"
                own = {**config.settings, **changes, "seed": seed, "run.dir": str(folder)}
                texts = tuple(f"{k}={json.dumps(v)}" for k, v in own.items())
                try:
                    run = read(base, texts)
                except ConfigError as err:
                    raise ConfigError(f"{path}, run {place}:\n{err}") from err
                cells.append(Cell(labels, seed, (*texts, "engine.resume=auto"), RunFolder(folder), run))
    return Path(config.dir), cells


def run_grid(
    path: str | Path, overrides: tuple[str, ...] | list[str] = (), *, part: str = "1/1", only_list: bool = False
) -> str:
    """Trains what is not done yet and writes table.md and results.csv; returns the table.

    part "2/4" takes every fourth run, from the second on, so that four jobs share one grid. A run that fails is named
    at the end, in a ConfigError, and the others go on; a preempted one ends the grid.
    """
    folder, cells = read_grid(path, overrides)
    first, step = _part(part)
    mine, failed = cells[first - 1 :: step], {}
    if not only_list:
        for i, cell in enumerate(mine):
            if cell.rows():
                continue
            log.info("run %d of %d: %s, seed %d", i + 1, len(mine), _slug(cell.labels), cell.seed)
            try:
                train(cell.run.origin, cell.overrides)
            except PoisonShieldError as err:
                log.error("%s", err)
                failed[str(cell.folder.path)] = err
        write_tables(folder, cells)
        if cells[0].inverts:
            inversion_tables.draw_grid(folder / "pictures.png", [(c.place, c.folder.path) for c in cells])
    if failed:
        lines = "\n".join(f"  {place}: {str(err).splitlines()[0]}" for place, err in failed.items())
        raise ConfigError(f"{len(failed)} of {len(mine)} runs failed; the others are in {folder}/table.md.\n{lines}")
    return table(cells)


def table(cells: list[Cell]) -> str:
    """A Markdown table: one line a place in the grid; mean and (lowest to highest) over seeds (and concepts).

    Axes that all blocks have are columns; what a block varies beside them stands together in one column.
    """
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.place))
    common = [axis for axis in axes if all(axis in cell.place for cell in cells)]
    ablation = ["varied"] if len(common) < len(axes) else []
    places = _places(cells)
    columns = _columns(cells, [row for _, rows, _, _ in places for row in rows])
    head = [*common, *ablation, *(number.title for number in columns), "seconds a run", "seeds done"]
    lines = [head, ["---"] * len(head)]
    for labels, rows, done, wanted in places:
        numbers = spreads(rows, columns)
        cost = f"{mean(r['seconds'] for r in rows):.0f}" if rows else "-"
        varied = ", ".join(f"{a}: {label}" for a, label in labels.items() if a not in common)
        place = [*(labels[a] for a in common), *([varied] if ablation else [])]
        lines.append([*place, *numbers, cost, f"{done} of {wanted}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    inverted = cells[0].inverts
    more = (
        inversion_tables.table([(labels, rows) for labels, rows, _, _ in places]) if inverted else _over_poisons(places)
    )
    return f"{text}\n\n{more}" if more else text


def write_tables(folder: Path, cells: list[Cell]) -> None:
    """table.md, and results.csv with one line for each finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.md", table(cells) + "\n")
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.labels))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    found = _rows(cells)
    concept = ["concept", "group"] if cells[0].inverts else []
    columns = _columns(cells, [row for rows in found for row in rows])
    keys = [*concept, *(number.key for number in columns), "steps", "seconds"]
    writer.writerow([*axes, "seed", *keys, "folder"])
    for cell, rows in zip(cells, found, strict=True):
        for row in rows:
            place = [cell.labels.get(a, "") for a in axes]
            writer.writerow([*place, cell.seed, *(row.get(k) for k in keys), cell.folder.path])
    write_whole(folder / "results.csv", buffer.getvalue())


def _over_poisons(places: list[tuple[dict[str, str], list[dict[str, Any]], int, int]]) -> str:
    """Lowest and mean accuracy over the poisons of an axis `poison` (Psn Min, Psn Avg), where it has two or more."""
    groups: dict[str, dict[str, list[float]]] = {}
    for labels, rows, _, _ in places:
        poisoned = [r for r in rows if r["poison"] != "none"]
        if "poison" in labels and poisoned:
            others = ", ".join(v for k, v in labels.items() if k != "poison")
            best = [r["test_top1"] if r["test_top1"] is not None else r["linear_top1"] for r in poisoned]
            groups.setdefault(others, {})[labels["poison"]] = best
    groups = {k: v for k, v in groups.items() if len(v) > 1}
    if not groups:
        return ""
    lines = ["| over poisons | lowest | mean |", "| --- | --- | --- |"]
    for others, per_poison in groups.items():
        means = [mean(v) for v in per_poison.values()]
        lines.append(f"| {others} | {min(means):.1f} | {mean(means):.1f} |")
    return "\n".join(
        [*lines, "", "Accuracy of the classifier, or of the linear probe where there is none; means over seeds."]
    )


def _places(cells: list[Cell]) -> list[tuple[dict[str, str], list[dict[str, Any]], int, int]]:
    """(labels, rows of the finished seeds, number of these, number of seeds) for each place, in the order of the file."""
    places: dict[str, tuple[dict[str, str], list[dict[str, Any]], int, int]] = {}
    for cell, found in zip(cells, _rows(cells), strict=True):
        labels, rows, done, wanted = places.get(_slug(cell.place), (cell.place, [], 0, 0))
        places[_slug(cell.place)] = (labels, rows + found, done + bool(found), wanted + 1)
    return list(places.values())


def _rows(cells: list[Cell]) -> list[list[dict[str, Any]]]:
    """Each cell's rows; those of a textual inversion also say how far its words are from the clean run's."""
    found = [cell.rows() for cell in cells]
    if cells[0].inverts:
        inversion_tables.add_word_distances(
            [
                inversion_tables.LearnedRun(c.labels, c.seed, rows, c.file_of)
                for c, rows in zip(cells, found, strict=True)
            ]
        )
    return found


def _columns(cells: list[Cell], rows: list[dict[str, Any]]) -> tuple[Number, ...]:
    """Which numbers of these rows the tables show."""
    return inversion_tables.columns(rows) if cells[0].inverts else columns_of(numbers_of(EVALUATIONS), rows)


def _choices(axis: str, choices: dict[str, dict[str, Any] | None] | list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each choice on an axis."""
    if isinstance(choices, dict):
        return [(str(label), settings or {}) for label, settings in choices.items()]
    return [(value if isinstance(value, str) else json.dumps(value), {axis: value}) for value in choices]


def _slug(labels: dict[str, str]) -> str:
    """A folder name: axis=label,axis=label with nothing in it that a file system minds."""
    parts = (f"{axis}={label}" for axis, label in labels.items())
    return ",".join(re.sub(r"[^A-Za-z0-9=.+_-]+", "_", part) for part in parts) or "base"


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: write which of how many, counted from 1, for example 2/4.")
    return int(match[1]), int(match[2])

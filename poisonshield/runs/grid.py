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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from pydantic import Field, field_validator

from poisonshield.config import Checker, Settings, Tree, dump, find_config
from poisonshield.errors import BusyError, ConfigError, PoisonShieldError
from poisonshield.files import MadeList, tell_of_disk, write_whole
from poisonshield.registry import suggest
from poisonshield.reports.tables import markdown, spreads
from poisonshield.runs.base import Experiment, read_experiment
from poisonshield.runs.parts.training import Place, Training

log = logging.getLogger(__name__)

REPEATS = "data.left_out"
"""An axis that repeats a run with other pictures left out: tables take its runs together, as they do seeds."""

_FILES = _TABLE, _ROWS, _PICTURES = "table.md", "results.csv", "pictures.png"
"""What a grid writes beside its runs' folders."""


class GridSettings(Settings):
    """A grid file."""

    base: str = Field(description="The experiment that all runs start from, relative to this file.")
    dir: str = Field(description="Where the runs' folders and the table go.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Every run is repeated with each.")
    settings: dict[str, Any] = Field({}, description="Settings of every run.")
    blocks: tuple[dict[str, dict[str, dict[str, Any] | None] | list[Any]], ...] = Field(
        min_length=1,
        description="Each a product of axes; an axis is a setting with values, or named groups of settings.",
    )

    @field_validator("blocks")
    @classmethod
    def _axes_hold_something(cls, blocks: tuple[dict, ...]) -> tuple[dict, ...]:
        empty = [axis for block in blocks for axis, choices in block.items() if not choices]
        if empty:
            raise ValueError(f"the axis {empty[0]} is empty. Give it values, or remove it.")
        return blocks


@dataclass(frozen=True)
class Cell:
    """One run of the grid: where it stands on each axis, its seed, and its experiment."""

    labels: dict[str, str]
    seed: int
    run: Training

    @property
    def place(self) -> dict[str, str]:
        """Its labels without those of repetitions, which tables take together."""
        return {axis: label for axis, label in self.labels.items() if axis != REPEATS}


class Grid(Experiment):
    """All its runs, every one of them checked. kind: that of the runs."""

    name: ClassVar[str] = "grid"
    asked_first: ClassVar[bool] = True
    settings: GridSettings
    cells: list[Cell]

    @classmethod
    def recognizes(cls, values: Mapping[str, Any]) -> bool:
        """By its blocks of axes."""
        return "blocks" in values or "base" in values

    def read(self, tree: Tree) -> None:
        """The grid file's own keys, then every run. Raises ConfigError naming a run by its place in the grid."""
        checker = Checker(tree)
        self._refuse_settings_of_runs(tree)
        self.settings = checker.settings(GridSettings, (), tree.values, owner="a grid")
        checker.finish()
        self.record = dump(self.settings, tree.values)
        base = Path(os.path.normpath(find_config(self.origin).parent / self.settings.base))
        self.cells = []
        known: dict[str, dict[str, str]] = {}
        for block in self.settings.blocks:
            for picks in itertools.product(*(_choices(axis, choices) for axis, choices in block.items())):
                labels = dict(zip(block, (label for label, _ in picks), strict=True))
                changes = {k: v for _, settings in picks for k, v in settings.items()}
                if known.setdefault(_slug(labels), labels) is not labels:
                    raise ConfigError(
                        f"{self.origin}: two runs are both called {_slug(labels)}. Name their axes or choices apart."
                    )
                self.cells += [
                    Cell(labels, seed, self._run(base, labels, changes, seed)) for seed in self.settings.seeds
                ]

    def _refuse_settings_of_runs(self, tree: Tree) -> None:
        """Raise one ConfigError for all keys that are not near one of a grid's own."""
        own = list(GridSettings.model_fields)
        others = [key for key in tree.values if key not in own and not suggest(key, own)]
        if others:
            where, known = tree.where((others[0],)), ", ".join(own)
            raise ConfigError(
                f"{where}: {self.origin} is a grid of runs: {', '.join(others)} is not a setting of a grid, which are "
                f"{known}.\n  What all its runs are told stands under `settings:`, as in settings={{engine.epochs: 2}}."
            )

    def _run(self, base: Path, labels: dict[str, str], changes: dict[str, Any], seed: int) -> Training:
        """The run of a place and a seed."""
        folder = Path(self.settings.dir) / _slug(labels) / f"seed-{seed}"
        own = {**self.settings.settings, **changes, "seed": seed, "run.dir": str(folder), "engine.resume": "auto"}
        try:
            run = read_experiment(base, [f"{key}={json.dumps(value)}" for key, value in own.items()])
            if not isinstance(run, Training):
                raise ConfigError(f"base {base} is a {run.name}, and a grid repeats trainings.")
            run.refuse_planting()
        except ConfigError as err:
            raise ConfigError(f"{self.origin}, run {_slug(labels)}:\n{err}") from err
        return run

    @property
    def folder(self) -> Path:
        """Where the table goes."""
        return Path(self.settings.dir)

    @property
    def kind(self) -> type[Training]:
        """Of its runs: what their tables show."""
        return type(self.cells[0].run)

    def train(self) -> Path:
        """Trains what is not done yet."""
        return self.train_part()

    def train_part(self, part: str = "1/1") -> Path:
        """Trains what is not done yet and writes table.md and results.csv; the folder.

        part "2/4" takes every fourth run, from the second on, so that four jobs share one grid. A run that fails is
        named at the end, in a ConfigError, and the others go on; a preempted one ends the grid. One that another
        process trains at this moment is passed over, so that grids that are started side by side share the work.
        """
        first, step = _part(part)
        mine, failed = self.cells[first - 1 :: step], {}
        self._refuse_files_of_others()
        for i, cell in enumerate(mine):
            if cell.run.rows():
                continue
            log.info("run %d of %d: %s, seed %d", i + 1, len(mine), _slug(cell.labels), cell.seed)
            try:
                self._train_cell(cell)
            except BusyError as err:
                log.warning("%s\n  Passed over: that process trains it.", str(err).splitlines()[0])
            except PoisonShieldError as err:
                log.error("%s", err)
                failed[str(cell.run.settings.run.dir)] = err
        with tell_of_disk(self.folder):
            self.write_tables()
            self.kind.draw(self.folder / _PICTURES, [(c.place, Path(c.run.settings.run.dir)) for c in self.cells])
        if failed:
            lines = "\n".join(f"  {place}: {str(err).splitlines()[0]}" for place, err in failed.items())
            raise ConfigError(
                f"{len(failed)} of {len(mine)} runs failed; the others are in {self.folder}/table.md.\n{lines}"
            )
        return self.folder

    def _train_cell(self, cell: Cell) -> None:
        """Claim the run's folder and train, unless another process has. Raises BusyError if one does so now."""
        with cell.run.folder.held():
            if not cell.run.rows():
                cell.run.train()

    def _refuse_files_of_others(self) -> None:
        """Raise ConfigError where a file of the grid's would replace one that no grid made here."""
        if not any(cell.run.folder.config.is_file() for cell in self.cells):  # an earlier version wrote no list
            MadeList(self.folder).refuse_others(_FILES)
        with tell_of_disk(self.folder):
            MadeList(self.folder).add(_FILES)

    def evaluate(self) -> str:
        """The table of what is done."""
        return self.table()

    def table(self) -> str:
        """A Markdown table: one line a place in the grid; mean and (lowest to highest) over seeds (and concepts).

        Axes that all blocks have are columns; what a block varies beside them stands together in one column.
        """
        axes = list(dict.fromkeys(axis for cell in self.cells for axis in cell.place))
        common = [axis for axis in axes if all(axis in cell.place for cell in self.cells)]
        ablation = ["varied"] if len(common) < len(axes) else []
        progress = self._progress()
        columns = self.kind.columns([row for at in progress for row in at.place.rows])
        head = [*common, *ablation, *(number.title for number in columns), "seconds a run", "seeds done"]
        lines = []
        for at in progress:
            labels, rows = at.place.labels, at.place.rows
            cost = f"{mean(r['seconds'] for r in rows):.0f}" if rows else "-"
            varied = ", ".join(f"{a}: {label}" for a, label in labels.items() if a not in common)
            where = [*(labels[a] for a in common), *([varied] if ablation else [])]
            lines.append([*where, *spreads(rows, columns), cost, f"{at.done} of {at.wanted}"])
        more = self.kind.summarize([at.place for at in progress])
        return "\n\n".join(filter(None, [markdown(head, *lines), more]))

    def write_tables(self) -> None:
        """table.md, and results.csv with one line for each finished run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / _TABLE, self.table() + "\n")
        axes = list(dict.fromkeys(axis for cell in self.cells for axis in cell.labels))
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        found = self._rows()
        columns = self.kind.columns([row for rows in found for row in rows])
        keys = [*self.kind.places_in_rows(), *(number.key for number in columns), "steps", "seconds"]
        writer.writerow([*axes, "seed", *keys, "folder"])
        for cell, rows in zip(self.cells, found, strict=True):
            for row in rows:
                place = [cell.labels.get(a, "") for a in axes]
                writer.writerow([*place, cell.seed, *(row.get(k) for k in keys), cell.run.settings.run.dir])
        write_whole(self.folder / _ROWS, buffer.getvalue())

    def _rows(self) -> list[list[dict[str, Any]]]:
        """Each cell's rows, with what their comparison tells."""
        found = [cell.run.rows() for cell in self.cells]
        self.kind.compare([(c.labels, c.run, rows) for c, rows in zip(self.cells, found, strict=True)])
        return found

    def _progress(self) -> list["Progress"]:
        """Every place, in the order of the file."""
        places: dict[str, Progress] = {}
        for cell, rows in zip(self.cells, self._rows(), strict=True):
            old = places.get(_slug(cell.place), Progress(Place(cell.place), 0, 0))
            whole = Place(old.place.labels, old.place.rows + rows)
            places[_slug(cell.place)] = Progress(whole, old.done + bool(rows), old.wanted + 1)
        return list(places.values())


@dataclass(frozen=True)
class Progress:
    """A place of the grid, how many of its runs are done, and how many there are."""

    place: Place
    done: int
    wanted: int


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

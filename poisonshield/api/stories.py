"""What the demos are made of: some runs of one config side by side, told as one table."""

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from poisonshield.runs import read_experiment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Story:
    """One run: its folder, how the table calls it, and what it changes in the config."""

    folder: str
    title: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A demo's result: a table (head, a title and cells for each line), a summary, minutes, and two files."""

    title: str
    head: list[str]
    titles: list[str]
    cells: list[list[str]]
    summary: str
    minutes: float
    report: Path
    figure: Path


def run_stories(
    config: Traversable, stories: Sequence[Story], out: Path, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """The last row of results of each story, run into a folder of its own under `out`."""
    rows = []
    for i, story in enumerate(stories):
        log.info("%d of %d: %s", i + 1, len(stories), story.title)
        place = f"run.dir={json.dumps(str(out / story.folder))}"
        folder = read_experiment(str(config), [*overrides, place, *story.overrides]).train()
        rows.append(json.loads((folder / "results.json").read_text())[-1])
    return rows


def as_data_uri(png: bytes) -> str:
    """A PNG as an address that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode()

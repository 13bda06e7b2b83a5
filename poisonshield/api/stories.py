"""What the demos are made of: some runs of one config side by side, as long as this machine has time for, told as one
table."""

import base64
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from poisonshield.batch import Batch
from poisonshield.engine.runfolder import RunFolder
from poisonshield.files import MadeList, tell_of_disk
from poisonshield.method import Method
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


@dataclass(frozen=True)
class Cost:
    """What a demo costs, counted in steps as `time_step` times them, and the time that it may take.

    steps: of each story at full length. training: all steps of all stories at full length. rest: what is not training:
    data, poison, evaluation, pictures. seconds: all of it may take so long.
    """

    steps: int
    training: float
    rest: float
    seconds: float


@dataclass(frozen=True)
class Length:
    """How long the stories of a demo are on this machine: `steps` of `full`, at `speed` timed steps a second."""

    steps: int
    full: int
    speed: float

    @property
    def overrides(self) -> list[str]:
        """What shortens a story; nothing at full length, so that its numbers do not depend on the machine."""
        return [] if self.steps == self.full else [f"engine.max_steps={self.steps}"]

    @property
    def told(self) -> str:
        """One sentence for the log."""
        steps = f"{self.full} steps" if self.steps == self.full else f"{self.steps} of {self.full} steps"
        return f"This machine: {self.speed:.1f} steps a second; {steps} a story."

    @property
    def warning(self) -> str:
        """One sentence for the summary of shortened stories; "" at full length."""
        if self.steps == self.full:
            return ""
        return (
            f" Shortened to {self.steps} of {self.full} steps a story, since this machine does {self.speed:.1f} "
            "steps a second; its numbers are not those of full length."
        )


RESERVE = 0.15  # of the time, where stories are shortened: one second of measuring is only a guess at minutes
LEAST = 0.1  # of the steps: with fewer there is nothing to see, so that a very slow machine takes its time


def choose_length(cost: Cost, seconds_a_step: float) -> Length:
    """Full length if a machine with such steps does it in time, else as many steps as fit in."""
    steps = cost.steps
    if seconds_a_step * (cost.training + cost.rest) > cost.seconds:
        room = (1 - RESERVE) * cost.seconds / seconds_a_step - cost.rest
        steps = min(cost.steps - 1, max(round(LEAST * cost.steps), int(cost.steps * room / cost.training)))
    return Length(steps, cost.steps, 1 / seconds_a_step)


def time_step(
    method: Method, batch: Batch, *, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one forward and backward pass: the lower quartile of those that fit into `seconds`, so that what else
    the machine does for a moment hardly counts. The first pass, which sets things up, is left out."""
    method(batch).loss.backward()
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < seconds:
        start = clock()
        method(batch).loss.backward()
        taken.append(clock() - start)
    return statistics.quantiles(taken, n=4)[0]


def claim_folder(out: Path, names: Sequence[str], stories: Sequence[Story]) -> None:
    """Note what a demo makes in its folder. Raises ConfigError if one of these is there and no demo made it."""
    with tell_of_disk(out):
        made = MadeList(out)
        if not any(
            RunFolder(out / story.folder).config.is_file() for story in stories
        ):  # an earlier version's has none
            made.refuse_others(names)
        made.add(names)


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

"""A worker that reads the data dies."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import ClassVar

from poisonshield.chaos.base import Fault, Trial, last_words, wait


class LoaderKill(Fault):
    """The run has to end with words that name it, and to go on when it is started again."""

    name: ClassVar[str] = "loader_kill"
    needs: ClassVar[str] = "no worker reads its data"
    overrides = ("data.workers=2", "data.source=tar")

    def strike(self, trial: Trial, case: str, *, steps: int, seconds: float, rng: Random) -> str | None:
        goal = rng.randint(1, max(1, steps // 2))
        process = trial.start_until(lambda pid: trial.steps_done() >= goal and bool(_children(pid)))
        if process is None:
            return None
        if workers := _children(process.pid):
            with suppress(ProcessLookupError):  # the run came to its end at this moment
                os.kill(rng.choice(workers), signal.SIGKILL)
        status, said = wait(process)
        if status == 0:
            return None
        return f"status {status}: {last_words(said)}"


def _children(pid: int) -> list[int]:
    """Processes that this one started and that live, by /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it is gone
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found

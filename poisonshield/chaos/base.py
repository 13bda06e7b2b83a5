"""A run that faults may strike, and what a fault is."""

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from poisonshield.errors import PoisonShieldError

_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LONGEST = 3600.0
"""Seconds after which a start hangs."""


class StartFailed(PoisonShieldError, RuntimeError):
    """A run that nothing disturbs any more did not end well, or not at all."""


@dataclass(frozen=True)
class Trial:
    """One run folder, and how to start its training in a process of its own."""

    config: str
    overrides: tuple[str, ...]
    folder: Path

    def start(self, **faults: Any) -> "subprocess.Popen[str]":
        """Start or go on, with what child.py is to do to it."""
        order = {
            "config": self.config,
            "overrides": [*self.overrides, f"run.dir={self.folder}", "engine.resume=auto"],
            **faults,
        }
        environment = {key: value for key, value in os.environ.items() if key not in _RANK_NAMES}
        return subprocess.Popen(
            [sys.executable, "-m", "poisonshield.chaos.child", json.dumps(order)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **faults: Any) -> tuple[int, str]:
        """Start and wait: the exit status and what was said. Raises StartFailed if it takes an hour."""
        return wait(self.start(**faults))

    def finish(self) -> float:
        """Train to the end, undisturbed; its seconds. Raises StartFailed with what the run said."""
        start = time.monotonic()
        status, said = self.run()
        if status:
            raise StartFailed(f"the run in {self.folder} ended with status {status}:\n{said[-3000:]}")
        return time.monotonic() - start

    def kill_after(self, seconds: float) -> bool:
        """Start, and kill without warning after so long; False if the run was done before."""
        process = self.start()
        try:
            wait(process, seconds)
        except StartFailed:
            return True
        return False

    def start_until(self, condition: Callable[[int], bool]) -> "subprocess.Popen[str] | None":
        """Start, and wait until `condition` of the process's number holds; None if the run ended before.

        Raises StartFailed if neither comes.
        """
        process, over = self.start(), time.monotonic() + _LONGEST
        try:
            while not condition(process.pid):
                if process.poll() is not None:
                    process.communicate()
                    return None
                if time.monotonic() > over:
                    wait(process, 0)
                time.sleep(0.02)
        except BaseException:
            process.kill()
            raise
        return process

    def steps_done(self) -> int:
        """By the last whole line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue
        return 0

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))


def wait(process: "subprocess.Popen[str]", seconds: float = _LONGEST) -> tuple[int, str]:
    """The exit status and what was said. Raises StartFailed, and kills it, if it is not over by then."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        raise StartFailed(f"process {process.pid} was not done after {seconds:.0f} s.") from None
    return process.returncode, said


class Fault(ABC):
    """One kind of misfortune. Its name is its file's."""

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    """Why it may not be able to strike a run."""
    overrides: ClassVar[tuple[str, ...]] = ()
    """Settings of the runs that it strikes, which must not change what is trained."""

    def cases(self, whole: Trial) -> Sequence[Any]:
        """What is tried one by one, such as the files that may be damaged. whole: the undisturbed run."""
        return ("",)

    @abstractmethod
    def strike(self, trial: Trial, case: Any, *, steps: int, seconds: float, rng: Random) -> str | None:
        """Do it to a new run, and say what was seen; None if it cannot be done to this run.

        steps, seconds: of the undisturbed run. Afterwards the run is started again until it is done.
        """


def last_words(said: str) -> str:
    """The first line of the last error that a process printed."""
    lines = [line for line in said.splitlines() if "Error" in line.split(":")[0] and not line.startswith(" ")]
    return lines[-1] if lines else (said.strip().splitlines() or ["nothing said"])[-1]

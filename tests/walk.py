"""How far a command walks through the house: which files of the package its calls enter, and how often they climb.

    python tests/walk.py print-config        # poisonshield train defend/vespr_cifar10_mini --print-config
    python tests/walk.py vespr-step          # one training step of VESPR on a small batch

A climb is a call from a file to one on a higher floor: the caller had to know somebody who stands above it. Calls
within a file, and code that runs when a module is imported, do not count. Floors are those of style: see FLOORS.
"""

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

FLOORS = {
    "__init__": 0, "errors": 0, "registry": 0, "config": 0, "files": 0, "terminal": 0, "plain": 0, "transfer": 0,
    "ops": 1, "batch": 1, "collectives": 1, "random": 1, "keys": 1,
    "losses": 2, "attacks": 2, "models": 2, "data": 2, "method": 2,
    "methods": 3, "defenses": 3, "poisons": 3, "evals": 3, "world": 3,
    "engine": 4,
    "runs": 5, "api": 5, "reports": 5,
    "commands": 6, "bench": 6, "chaos": 6, "cli": 6,
}  # fmt: skip
"""Of each room; tests/test_floors.py holds imports to it."""


@dataclass
class Walk:
    """files: calls into each file, by its path in the package. moves: from file to file. climbs: those that go up."""

    files: Counter[str] = field(default_factory=Counter)
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)
    climbs: Counter[tuple[str, str]] = field(default_factory=Counter)

    def describe(self) -> str:
        """One line of numbers."""
        return (
            f"{len(self.files)} files entered, {sum(self.moves.values())} moves between files ({len(self.moves)} "
            f"different), {sum(self.climbs.values())} climbs ({len(self.climbs)} different)"
        )


def floor_of(file: str, floors: dict[str, int] = FLOORS) -> int:
    """Of a file in the package."""
    return floors[file.split("/")[0].removesuffix(".py")]


def follow(work: Callable[[], Any], package: Path, floors: dict[str, int] = FLOORS) -> Walk:
    """The walk of what `work` calls, on this thread. package: the folder of the package's code."""
    walk, root = Walk(), f"{package}/"

    def enter(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name == "<module>" or not code.co_filename.startswith(root):
            return
        here, back = code.co_filename.removeprefix(root), frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(root):
            back = back.f_back  # through torch, typer or pydantic to whoever of ours called them
        if back is not None and _imports(back):
            return
        walk.files[here] += 1
        if back is None:
            return
        there = back.f_code.co_filename.removeprefix(root)
        if there != here:
            walk.moves[there, here] += 1
            if floor_of(here, floors) > floor_of(there, floors):
                walk.climbs[there, here] += 1

    sys.setprofile(enter)
    try:
        work()
    finally:
        sys.setprofile(None)
    return walk


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame runs while some module is imported: class bodies, decorators and the like."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and "importlib" in str(frame.f_back and frame.f_back.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def print_config() -> Callable[[], None]:
    """`poisonshield train defend/vespr_cifar10_mini --print-config`, its output thrown away."""
    from poisonshield.cli import main

    config = Path(__file__).resolve().parents[1] / "configs" / "defend" / "vespr_cifar10_mini.yaml"

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main(["train", str(config), "--print-config"])

    return work


def vespr_step() -> Callable[[], None]:
    """Forward and backward of one VESPR step, as the shipped small config builds it, on eight made-up images."""
    import torch
    from tiny import tiny_batch

    from poisonshield.runs import read_experiment
    from poisonshield.runs.classify import build_method

    config = Path(__file__).resolve().parents[1] / "configs" / "defend" / "vespr_cifar10_mini.yaml"
    method = build_method(read_experiment(config), 4).train()
    batch = tiny_batch(8, side=32)
    torch.manual_seed(0)
    return lambda: method(batch).loss.backward()


WORKS = {"print-config": print_config, "vespr-step": vespr_step}


if __name__ == "__main__":
    import poisonshield

    sys.path.insert(0, str(Path(__file__).parent))
    package = Path(poisonshield.__file__).parent
    for name in sys.argv[1:] or WORKS:
        found = follow(WORKS[name](), package)
        print(f"{name}: {found.describe()}")
        for (low, high), count in found.climbs.most_common():
            print(f"  {count:4d}  {low} -> {high}")

"""What two ranks have to do for several test files, in one start of them."""

import importlib
import time
from pathlib import Path
from typing import Any


def run_each(rank: int, world: int, folders: dict[str, Path]) -> dict[str, Any]:
    """{module: what its `two_ranks(rank, world, folder)` answers}; seconds.txt in its folder says how long."""
    answers = {}
    for name, folder in folders.items():
        start = time.perf_counter()
        answers[name] = importlib.import_module(name).two_ranks(rank, world, folder)
        if rank == 0:
            (folder / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}\n")
    return answers

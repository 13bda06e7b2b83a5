"""How a run ended: its last weights and which samples each epoch had."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poisonshield.engine.checkpoint import load_plain, read_index
from poisonshield.errors import CheckpointError

_OF_ONE_RANK = "rank-"
"""Beginning of files that hold clocks too, and positions that a finished run does not need."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """steps: how many. state: the content of the last checkpoint's files. samples: what metrics.jsonl tells of each
    epoch's samples."""

    steps: int
    state: dict[str, Any]
    samples: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Outcome):
            return NotImplemented
        return (self.steps, self.samples) == (other.steps, other.samples) and is_same(self.state, other.state)


def read_outcome(folder: Path) -> Outcome:
    """Of a finished run. Raises CheckpointError if it left no checkpoint."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint, so there is nothing to compare.")
    index = read_index(found[-1])
    names = [name for name in index["files"] if not Path(name).name.startswith(_OF_ONE_RANK)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples = tuple(row["samples"] for row in rows if "samples" in row)
    return Outcome(index["step"], {name: load_plain(found[-1] / name) for name in names}, samples)


def is_same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(is_same, a, b))
    return type(a) is type(b) and a == b


def _bits(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

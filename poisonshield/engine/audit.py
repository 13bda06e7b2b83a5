"""Whether each epoch of a run trained on every sample once: what its folder tells, held against the keys of its data.

metrics.jsonl tells of epochs that ended, and the newest checkpoint of those that were not written there yet (tally.py
says how). A digest that is wrong by one sample names it, as the difference is then the hash of its key.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from poisonshield.engine.checkpoint import Checkpoints, load_plain
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError
from poisonshield.random import sample_ids

_ALL = 2**64


@dataclass(frozen=True)
class Epochs:
    """What an epoch of a run is. keys: of all samples. sizes: of its batches. first(epoch, n): int64 numbers of the
    samples in its first n batches. ended(state): how many epochs had ended when the stream saved this state."""

    keys: Sequence[str]
    sizes: Sequence[int]
    first: Callable[[int, int], Tensor]
    ended: Callable[[Mapping[str, Any]], int]


@dataclass(frozen=True)
class Finding:
    """What is to be said of an epoch, and whether it is as it should be."""

    text: str
    sound: bool


@dataclass(frozen=True)
class Told:
    """What a run tells of an epoch: samples trained on, the sum of their hashes, and whether it has ended."""

    epoch: int
    count: int
    total: int
    whole: bool


def audit(folder: RunFolder, epochs: Epochs) -> list[Finding]:
    """A finding for each epoch. Raises CheckpointError if the folder tells of none."""
    told, ended = _read_metrics(folder), 0
    found = Checkpoints(folder.checkpoints, keep=1).last_good()
    if found is not None:
        state = load_plain(found / "rank-0.pt")
        ended = epochs.ended(state["stream"])
        known = {t.epoch for t in told if t.whole}
        told += [t for t in _read_tally(state, len(epochs.sizes)) if t.epoch not in known]
    if not told:
        raise CheckpointError(
            f"{folder.path} tells of no epoch: it has no checkpoint yet, or was trained by a version that kept no "
            "digests of its samples.\n  Train it, or go on with it by engine.resume=auto."
        )
    wholes = [t.epoch for t in told if t.whole]
    findings = []
    for epoch in range(max([ended, *(t.epoch + 1 for t in told)])):
        of = [t for t in told if t.epoch == epoch]
        if wholes.count(epoch) > 1:
            findings.append(Finding(f"epoch {epoch}: it is told {wholes.count(epoch)} times that it ended.", False))
        elif epoch in wholes:
            findings.append(_judge_whole(next(t for t in of if t.whole), epochs))
        elif epoch < ended or not of:
            findings.append(Finding(f"epoch {epoch}: nothing tells what it trained on to its end.", False))
        else:
            findings.append(_judge_part(of[-1], epochs))
    return findings


def _read_metrics(folder: RunFolder) -> list[Told]:
    """What the lines of metrics.jsonl tell, in their order; a last line that was cut off is passed over."""
    lines = folder.metrics.read_text().splitlines() if folder.metrics.is_file() else []
    told = []
    for number, line in enumerate(lines, 1):
        try:
            rows = json.loads(line).get("samples", [])
            told += [Told(int(r["epoch"]), int(r["count"]), int(r["digest"], 16), "part" not in r) for r in rows]
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            if number < len(lines):
                raise CheckpointError(f"{folder.metrics}:{number} is not readable as a line of metrics: {err}") from err
    return told


def _read_tally(state: Mapping[str, Any], batches: int) -> list[Told]:
    """What a checkpoint tells; those of earlier versions tell nothing."""
    rows = (state.get("tally") or {"epochs": []})["epochs"]
    return [Told(epoch, count, total, seen == batches) for epoch, seen, count, total in rows]


def _judge_whole(told: Told, epochs: Epochs) -> Finding:
    return _judge(told, _hashes(epochs.keys), epochs.keys, end="")


def _judge_part(told: Told, epochs: Epochs) -> Finding:
    """Of an epoch that has not ended: its first batches, whose order is known."""
    starts = [0, *accumulate(epochs.sizes)]
    batches = min(range(len(starts)), key=lambda n: abs(starts[n] - told.count))
    numbers = epochs.first(told.epoch, batches).tolist() if batches else []
    keys = [epochs.keys[i] for i in numbers]
    return _judge(told, _hashes(keys), keys, end=f" of {len(epochs.keys):,}; it has not ended")


def _judge(told: Told, hashes: Sequence[int], keys: Sequence[str], *, end: str) -> Finding:
    """Whether what is told is each of these samples once."""
    wanted, many = sum(hashes) % _ALL, len(hashes)
    start = f"epoch {told.epoch}: {told.count:,} samples{end}"
    if (told.count, told.total) == (many, wanted):
        return Finding(f"{start}, each once, digest {told.total:016x}", True)
    missing = many - told.count
    if missing > 0:
        words = f"{missing:,} of {many:,} were not trained on (as in steps that engine.nonfinite: skip drops)"
    elif missing < 0:
        words = f"there are {many:,}, so some came twice"
    else:
        words = f"but not each once: the digest is {told.total:016x}, that of the keys {wanted:016x}"
    return Finding(f"{start}, {words}{_name_one(told, wanted, missing, dict(zip(hashes, keys, strict=True)))}", False)


def _name_one(told: Told, wanted: int, missing: int, names: Mapping[int, str]) -> str:
    """The sample that is missing or came twice, where it is one alone."""
    lost = (wanted - told.total) % _ALL
    if missing == 1 and lost in names:
        return f": {names[lost]} is missing"
    if missing == -1 and (-lost) % _ALL in names:
        return f": {names[(-lost) % _ALL]} came twice"
    if missing == 0:
        for value, name in names.items():
            if twice := names.get((value - lost) % _ALL):
                return f": {name} is missing and {twice} came twice"
    return ""


def _hashes(keys: Sequence[str]) -> list[int]:
    """Of each key, in [0, 2^64)."""
    return [value % _ALL for value in sample_ids(keys).tolist()]

"""What a training survives: one fault after another is put upon a small run, and a ledger tells how it ended.

A run that nothing disturbs comes first. Then each fault gets a run folder of its own: it strikes while the run trains,
and the run is started again with engine.resume=auto until it is done. Its last weights, and the samples of each epoch,
have to be those of the undisturbed run. One file a fault; `child.py` is the process that trains.
"""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poisonshield.chaos.base import Fault, Trial
from poisonshield.chaos.outcome import Outcome, read_outcome
from poisonshield.errors import ConfigError, PoisonShieldError
from poisonshield.files import write_whole
from poisonshield.registry import Registry

FAULTS = Registry("poisonshield.chaos.faults", kind="fault")
KILL = "kill"


class Unequal(PoisonShieldError, ArithmeticError):
    """A run that was disturbed ended with other weights or other samples than the one that was not."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. equal: None where the fault cannot strike this run; `seen` says why then."""

    fault: str
    seen: str
    equal: bool | None


def run_chaos(
    config: str, overrides: Sequence[str], out: Path, *, kills: int, faults: Sequence[str], seed: int
) -> Iterator[Entry]:
    """The ledger, entry by entry; it is also kept in out/ledger.json.

    kills: how often a run is killed at a random moment, in as many runs as that takes. faults: names of the others.
    out: a folder for the runs, new or empty. Raises ConfigError for another folder or an unknown fault, and
    PoisonShieldError if the undisturbed run fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty. Choose a new folder for these runs.")
    chosen: list[Fault] = [FAULTS.get(name)() for name in faults]
    out.mkdir(parents=True, exist_ok=True)
    whole = Trial(config, tuple(overrides), out / "undisturbed")
    seconds = whole.finish()
    wanted = read_outcome(whole.folder)
    rng, entries = random.Random(seed), []
    settings = (*overrides, f"engine.checkpoint_every_steps={max(1, wanted.steps // 10)}")

    def note(entry: Entry) -> Entry:
        entries.append(entry)
        write_whole(out / "ledger.json", json.dumps([asdict(e) for e in entries], indent=1))
        return entry

    yield from map(note, _kill(config, settings, out, wanted, kills=kills, seconds=seconds, rng=rng))
    for fault in chosen:
        for number, case in enumerate(fault.cases(whole)):
            trial = Trial(config, (*settings, *fault.overrides), out / f"{fault.name}-{number}")
            yield note(_strike(fault, case, trial, wanted, rng, seconds))


def _strike(fault: Fault, case: Any, trial: Trial, wanted: Outcome, rng: random.Random, seconds: float) -> Entry:
    name = f"{fault.name} {case}".strip()
    try:
        seen = fault.strike(trial, case, steps=wanted.steps, seconds=seconds, rng=rng)
    except PoisonShieldError as err:
        return Entry(name, str(err), False)
    if seen is None:
        return Entry(name, fault.needs, None)
    return _finish(name, seen, trial, wanted)


def _finish(name: str, seen: str, trial: Trial, wanted: Outcome) -> Entry:
    """Start the run again until it is done; a run that cannot go on is not equal."""
    try:
        trial.finish()
        return Entry(name, seen, _compare(trial, wanted))
    except PoisonShieldError as err:
        return Entry(name, f"{seen}; then {err}", False)


def _kill(
    config: str, settings: Sequence[str], out: Path, wanted: Outcome, *, kills: int, seconds: float, rng: random.Random
) -> Iterator[Entry]:
    """Runs that are killed at random moments until each is done, and `kills` in all."""
    left, number = kills, 0
    while left > 0:
        trial, done = Trial(config, tuple(settings), out / f"{KILL}-{number}"), 0
        while done < left and trial.kill_after(rng.uniform(0, seconds)):
            done += 1
        entry = _finish(f"{KILL} x {done}", "killed, started again", trial, wanted)
        if done or not entry.equal:
            yield entry
        left, number = left - done, number + 1


def _compare(trial: Trial, wanted: Outcome) -> bool:
    """Whether the run ended as the undisturbed one; a folder that did is removed, another one stays to be looked at."""
    equal = read_outcome(trial.folder) == wanted
    if equal:
        shutil.rmtree(trial.folder)
    return equal

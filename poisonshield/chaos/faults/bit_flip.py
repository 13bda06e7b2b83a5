"""A bit of a checkpoint file turns over while the run is down."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar

from poisonshield.chaos.base import Fault, Trial


class BitFlip(Fault):
    """In each file of the newest checkpoint, one after the other; the one before has to take its place."""

    name: ClassVar[str] = "bit_flip"
    needs: ClassVar[str] = "the run is too short for two checkpoints before its end"

    def cases(self, whole: Trial) -> Sequence[str]:
        last = whole.checkpoints()[-1]
        return sorted(str(path.relative_to(last)) for path in last.rglob("*") if path.is_file())

    def strike(self, trial: Trial, case: str, *, steps: int, seconds: float, rng: Random) -> str | None:
        process = trial.start_until(lambda _: len(trial.checkpoints()) > 1)
        if process is None:
            return None
        process.kill()
        process.communicate()
        newest = trial.checkpoints()[-1]
        where = flip_bit(newest / case, rng)
        return f"byte {where} of {newest.name} changed"


def flip_bit(path: Path, rng: Random) -> int:
    """Turn one bit of a file over; which byte it is in."""
    content = bytearray(path.read_bytes())
    where = rng.randrange(len(content))
    content[where] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return where

"""The data come late once."""

from random import Random
from typing import ClassVar

from poisonshield.chaos.base import Fault, Trial, last_words


class SlowReader(Fault):
    """Nothing but time may change."""

    name: ClassVar[str] = "slow_reader"

    def strike(self, trial: Trial, case: str, *, steps: int, seconds: float, rng: Random) -> str | None:
        late = rng.uniform(2, 5)
        status, said = trial.run(slow_step=rng.randint(1, steps), slow_seconds=late)
        return f"{late:.1f} s late, status {status}" + (f": {last_words(said)}" if status else "")

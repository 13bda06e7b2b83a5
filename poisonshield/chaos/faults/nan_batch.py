"""One batch holds pixels that are not numbers."""

from random import Random
from typing import ClassVar

from poisonshield.chaos.base import Fault, Trial, last_words


class NanBatch(Fault):
    """The run has to stop before a weight moves, and to go on once the batch is sound."""

    name: ClassVar[str] = "nan_batch"
    needs: ClassVar[str] = "the run went on: what it learns from does not come as batches of pixels"

    def strike(self, trial: Trial, case: str, *, steps: int, seconds: float, rng: Random) -> str | None:
        status, said = trial.run(nan_step=rng.randint(1, steps))
        return None if status == 0 else f"status {status}: {last_words(said)}"

"""The disk takes no more while a checkpoint is written."""

from random import Random
from typing import ClassVar

from poisonshield.chaos.base import Fault, Trial, last_words


class FullDisk(Fault):
    """The process may write no file larger than a part of the checkpoint's largest."""

    name: ClassVar[str] = "full_disk"
    needs: ClassVar[str] = "the run was done although its files were limited"
    largest = 0

    def cases(self, whole: Trial) -> tuple[str]:
        self.largest = max(path.stat().st_size for path in whole.checkpoints()[-1].rglob("*") if path.is_file())
        return ("",)

    def strike(self, trial: Trial, case: str, *, steps: int, seconds: float, rng: Random) -> str | None:
        status, said = trial.run(max_file_bytes=rng.randrange(self.largest // 4, self.largest * 3 // 4))
        if status == 0:
            return None
        drafts = len(list(trial.folder.rglob(".*.tmp")))
        return f"status {status}, {drafts} drafts left: {last_words(said)}"

"""The process that trains: `python -m poisonshield.chaos.child ORDER`, where ORDER says in JSON what to train and what
to do to it: nan_step (pixels of that batch are not numbers), slow_step and slow_seconds (that batch comes late),
max_file_bytes (the disk takes no larger file)."""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from poisonshield import api
from poisonshield.batch import Batch
from poisonshield.engine.trainer import Trainer


class Disturber:
    """Hands on a trainer's batches, and does to some what it was told to."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order, self.gather = order, Trainer.gather

    def __call__(self, trainer: Trainer, batches: Iterator[Batch]) -> Batch:
        step = trainer.step + 1
        if step == self.order.get("slow_step"):
            time.sleep(self.order["slow_seconds"])
        batch = self.gather(trainer, batches)
        if step == self.order.get("nan_step"):
            return spoil(batch)
        return batch


def spoil(batch: Batch) -> Batch:
    """The batch with pixels that are not numbers, in its views too."""
    x = None if batch.x is None else torch.full_like(batch.x, torch.nan, dtype=torch.float32)
    views = None if batch.views is None else tuple(torch.full_like(v, torch.nan) for v in batch.views)
    return batch.replace(x=x, views=views)


def limit_files(max_bytes: int) -> None:
    """From now on every write beyond this size fails, as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    if "max_file_bytes" in order:
        limit_files(order["max_file_bytes"])
    disturber = Disturber(order)
    setattr(Trainer, "gather", lambda trainer, batches: disturber(trainer, batches))  # noqa: B010
    api.train(order["config"], order["overrides"])

"""Settings with which a poison of any kind is made in seconds, for tests of all poisons."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from poisonshield.batch import Batch
from poisonshield.poisons.base import Poison
from poisonshield.poisons.learned.base import LearnedPoison

QUICK = {
    "steps": 2, "train_steps": 2, "max_rounds": 2, "epochs": 1, "restarts": 2, "rounds": 2,
    "surrogate": {"model": {"name": "resnet_mini", "stem_stride": 2, "widths": (4, 4, 8, 8)}, "batch_size": 16},
}  # fmt: skip
"""Of poisons that are trained, where they have them: minutes would be spent on the defaults."""


def make_config(cls: type[Poison], batch: Batch) -> Any:
    """Default settings, but for work that would take long, and a file for these samples where one is read."""
    trained = issubclass(cls, LearnedPoison)
    if trained and "path" in cls.Config.model_fields:
        return cls.Config(path=str(_make_file(batch)))
    return cls.Config(**{k: v for k, v in QUICK.items() if trained and k in cls.Config.model_fields})


def _make_file(batch: Batch) -> Path:
    """Noise of up to 8 levels for the samples of a batch, by key."""
    path = Path(tempfile.mkdtemp()) / "noise.npz"
    noise = np.random.default_rng(0).integers(-8, 9, batch.pixels().shape).astype(np.int8)
    np.savez(path, noise=noise, keys=np.array(batch.keys))
    return path

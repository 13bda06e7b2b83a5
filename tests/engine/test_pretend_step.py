"""One training step of the shipped VESPR config as a GPU's host sees it: kernels to launch, copies and waits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pretend_device import CUDA, Seen, pretend_device

from poisonshield.batch import Batch
from poisonshield.data.views import Views
from poisonshield.engine import trainer as loop
from poisonshield.engine.runfolder import RunFolder
from poisonshield.runs.base import read_experiment
from poisonshield.runs.classify import build_method

IMAGES, SIDE, STEPS = 16, 16, 3  # counts do not depend on the side


class FromMemory:
    """The same 16 host pictures each step, moved and augmented as ShardStream does it; remembers what was seen."""

    steps_per_epoch = 100

    def __init__(self, views: Views, seen: Seen) -> None:
        self.views, self.seen, self.steps = views, seen, []

    def __iter__(self) -> Iterator[Batch]:
        keys = tuple(f"k{i}" for i in range(IMAGES))
        x, y = torch.rand(IMAGES, 3, SIDE, SIDE).pin_memory(), (torch.arange(IMAGES) % 10).pin_memory()
        while True:
            self.steps.append(self.seen.copy())
            self.seen.clear()
            yield self.views(Batch(keys, x=x, y=y).to(CUDA, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> Seen:
    """What the second step asked for; it logs nothing."""
    folder = tmp_path_factory.mktemp("run")
    run = read_experiment("defend/vespr_in100", [f"run.dir={folder}", f"engine.max_steps={STEPS}"])
    with pytest.MonkeyPatch.context() as patch, pretend_device() as seen:
        patch.setattr(loop, "choose_device", lambda wish: CUDA)
        method = build_method(run, 100)
        views = Views(run.settings.views, default=method.default_views, count=method.num_views, seed=run.seed)
        stream = FromMemory(views, seen)
        trainer = run.trainer(method, stream, RunFolder(folder))
        trainer.save = lambda: None
        trainer.fit()
    return stream.steps[-1]


def test_step_starts_few_kernels(step):
    assert step.count("launch") < 4000, step.table()


def test_step_seldom_waits(step):
    assert step.count("wait") <= 35, step.table()

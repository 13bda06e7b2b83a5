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

IMAGES, STEPS = 16, 4  # the attack is recorded in the second step; the third is looked at
SIDE = 16  # counts do not depend on it
FEWER = ["defenses.0.attack.steps=1"]  # a recorded attack is one launch, however long it is


class FromMemory:
    """The same 16 host pictures each step, moved and augmented as ShardStream does it; remembers what was seen."""

    steps_per_epoch, stage_seconds = 100, 0.0

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
    """What the third step asked for; it logs nothing."""
    folder = tmp_path_factory.mktemp("run")
    run = read_experiment("defend/vespr_in100", [f"run.dir={folder}", f"engine.max_steps={STEPS}", *FEWER])
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
    assert step.count("launch") <= 900, step.table()


def test_step_waits_for_nothing_but_an_earlier_step(step):
    assert step.count("wait") <= 1, step.table()


def test_step_copies_small_things_only(step):
    """Ids for the views and for the attack, the guard's questions and its verdict; pixels and labels."""
    assert step.count("copy") <= 6, step.table()


def test_kernels_that_run_are_the_fused_ones(step):
    assert step.ops == {
        "augment on triton": 2, "keyed_uniform on triton": 1, "pgd_random_start_ on triton": 1,
        "pgd_step_ on triton": 1,
    }  # fmt: skip

"""Every method inside VESPR, saved and resumed by new objects, ends as the run that never stopped, bit for bit.

Weights, targets, centres, DirectSet's correlation, warm starts, optimiser, random states and the position in the data.
Images are noise and the network is tiny; an epoch has 5 steps and a run 7, so that the end of an epoch is crossed.
"""

import pytest
import torch
from runs import MINI, SSL_METHODS, choose_method, fit, logged, opened
from torch import nn

from poisonshield.data.writer import ShardWriter
from poisonshield.engine.checkpoint import load_plain
from poisonshield.engine.processes import seed_everything

# What each case adds to its method: all state that a method may hold is in one of them.
EXTRAS = {
    "simclr": ("defenses.0.warm_start=true",),
    "moco": ("method.momentum_schedule=cosine",),
    "byol": ("method.directset=0.5", "method.directset_every=2"),
    "dino": ("method.momentum_schedule=cosine",),
}
STATE = {
    "simclr": ("memory.flat",),
    "moco": ("method.target.",),
    "byol": ("method.target.", "method.predictor.correlation", "method.predictor.weight", "method.predictor.steps"),
    "dino": ("method.target.", "method.centre"),
}
COMMON = (
    "data.batch_size=8", "data.poison=null", "model.widths=[8,8,8,8]",
    "engine.max_steps=7", "engine.checkpoint_every_steps=1", "engine.keep_checkpoints=9", "engine.log_every_steps=1",
    "engine.device=cpu", "defenses.0.attack.steps=2", "defenses.0.attack.step_size=4/255",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images to train on and 8 others, of 4 classes."""
    root, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("test", 8)):
        with ShardWriter(root / part, classes=list("abcd"), image_size=(16, 16), samples_per_shard=100) as writer:
            for i in range(count):
                image = torch.randint(0, 256, (3, 16, 16), generator=generator).to(torch.uint8)
                writer.write(f"{part}-{i}", image, i % 4)
    return root


def with_dropout(method):
    """The method with dropout on its features, so that the global random state is part of what must come back."""
    method.encoder.backbone.fc = nn.Dropout(0.2)
    return method


def run(folder, where, name, *more):
    """The run folder of a finished run."""
    method = choose_method(name, hidden=16, out=12, predictor=8, bottleneck=8)
    overrides = (f"data.train={folder}", method, *COMMON, *EXTRAS.get(name, ()))
    fit(where, (*overrides, *more), data=opened(MINI, f"data.train={folder}", "data.poison=null"), change=with_dropout)
    return where


def saved(where, step):
    """{file: what is in it} of a checkpoint, without the times that are measured."""
    step = where / "checkpoints" / f"step-{step:08d}"
    files = {name: load_plain(step / name) for name in ("method.pt", "optimizer.pt", "rank-0.pt")}
    del files["rank-0.pt"]["metrics"]
    return files


def same(a, b):
    """True for the same tensors, bit for bit, in the same places."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module", params=SSL_METHODS)
def whole(request, folder, tmp_path_factory):
    """(name, folder of the uninterrupted run)."""
    where = tmp_path_factory.mktemp("whole") / request.param
    return request.param, run(folder, where, request.param)


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_run_ends_as_the_uninterrupted_one(whole, step, folder, tmp_path):
    name, there = whole
    seed_everything(99)
    here = run(folder, tmp_path / "resumed", name, f"engine.resume={there}/checkpoints/step-{step:08d}")
    assert logged(here) == logged(there)[step:]
    ended, expected = saved(here, 7), saved(there, 7)
    for file in expected:
        assert same(ended[file], expected[file]), file


def test_state_of_its_own_moves_all_along(whole):
    """Otherwise that it comes back would say nothing."""
    name, there = whole
    early, late = (saved(there, step)["method.pt"] for step in (3, 7))
    for part in STATE.get(name, ()):
        moved = [k for k in early if k.startswith(part) and not torch.equal(early[k], late[k])]
        assert moved, part
    random_states = [saved(there, step)["rank-0.pt"]["random"] for step in (3, 7)]
    assert not same(*random_states)

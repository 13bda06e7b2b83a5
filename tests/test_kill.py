"""kill -9 at any moment, start again: the weights are those of a run that nobody killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 40, 4
COMMAND = [
    sys.executable, str(ROOT / "launch" / "train.py"), str(ROOT / "configs" / "defend" / "vespr_cifar10_mini.yaml"),
    f"engine.max_steps={STEPS}", f"engine.checkpoint_every_steps={EVERY}", "engine.log_every_steps=1",
    "engine.device=cpu", "engine.threads=1", "engine.resume=auto", "model.widths=[8,8,16,16]", "method.hidden=32",
    "method.out=32", "data.batch_size=32", "data.source=tar", "evaluate.robust=null",
    "evaluate.knn=null", "evaluate.linear=null",
]  # fmt: skip


def start(folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen([*COMMAND, f"run.dir={folder}"], env=environment, stderr=subprocess.PIPE, text=True)


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def kill_somewhere(folder, rng, most):
    """Start, let it do up to `most` steps and a random part of one (or of a save), kill -9. True if it did."""
    process, goal = start(folder), rng.randint(1, most)
    while steps_logged(folder) == 0 and process.poll() is None:
        time.sleep(0.01)
    begun = steps_logged(folder)  # a resumed run takes the file back to its checkpoint first
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end and abs(steps_logged(folder) - begun) < goal:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    if process.poll() is not None:
        process.communicate()
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.dist
@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_weights_after_kills_are_those_of_an_uninterrupted_run(kills, tmp_path):
    finish(start(tmp_path / "whole"))
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    killed = tmp_path / "killed"
    assert sum(kill_somewhere(killed, rng, STEPS // (2 * kills)) for _ in range(kills)) == kills
    finish(start(killed))
    whole, again = (load_file(f / "export" / "method.safetensors") for f in (tmp_path / "whole", killed))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (tmp_path / "whole", killed)]
    assert len(lines[0]) == len(lines[1]) == STEPS

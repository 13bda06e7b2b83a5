"""Two processes, one folder: one works, the other is told before it does anything, and grids share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from poisonshield.errors import BusyError
from poisonshield.files import LOCK, Lock
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify

ROOT = Path(__file__).resolve().parents[1]
MINI = str(ROOT / "configs" / "defend" / "vespr_cifar10_mini.yaml")
SMALL = [
    "engine.log_every_steps=1", "engine.device=cpu", "engine.threads=1", "model.widths=[8,8,8,8]", "method.hidden=16",
    "method.out=16", "data.batch_size=16", "defenses.0.attack.steps=1", "evaluate.robust=null", "evaluate.knn=null",
    "evaluate.linear=null",
]  # fmt: skip


def start(*arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "poisonshield.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path, lines=1, seconds=60):
    end = time.monotonic() + seconds
    while not (path.is_file() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.dist
def test_second_run_is_refused_and_a_killed_one_is_taken_over(tmp_path):
    """faults B: two runs in one folder, lines interleave, both rc 0."""
    folder = tmp_path / "run"
    long = [*SMALL, "engine.max_steps=5000", "engine.resume=auto", f"run.dir={folder}"]
    first = start("train", MINI, *long)
    wait_for(folder / "metrics.jsonl", lines=2)
    second = start("train", MINI, *long)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1 and f"BusyError: {folder} is in use: process {first.pid} on" in said
    assert "Traceback" not in said
    first.kill()
    first.communicate()
    assert (folder / LOCK).is_file()
    third = start("train", MINI, *long, "engine.max_steps=3")
    _, said = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert not (folder / LOCK).exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.dist
def test_ctrl_c_reaches_all_processes_of_a_terminal_and_the_run_saves_itself(tmp_path):
    """faults B: Ctrl-C, rc 130, nothing saved. The processes that read data get it too."""
    run = [*SMALL, "engine.max_steps=5000", "data.workers=2", "data.source=tar", f"run.dir={tmp_path / 'run'}"]
    process = start("train", MINI, *run, start_new_session=True)
    wait_for(tmp_path / "run" / "metrics.jsonl", lines=2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.count("Ctrl-C: saving") == 1 and "Traceback" not in said, said
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name.startswith("step-") and not (tmp_path / "run" / LOCK).exists()


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    blocks = [{"data.batch_size": [16, 32, 64]}]
    path.write_text(yaml.safe_dump({"base": MINI, "dir": str(tmp_path / "runs"), "blocks": blocks}))
    return read_experiment(path)


def finish(run):
    """As a training leaves its folder, at once."""
    run.folder.claim(run.record, resume="auto")
    numbers = {"test_top1": 1.0, "knn_top1": None, "linear_top1": None, "steps": 1, "seconds": 1.0}
    run.folder.add_result({"seed": run.seed, "poison": "none", **numbers}, identity=("seed",))


def test_grid_passes_over_a_cell_that_another_process_trains(tmp_path, grid, monkeypatch, caplog):
    trained = []
    monkeypatch.setattr(Classify, "train", lambda run: (trained.append(run.settings.data.batch_size), finish(run)))
    first, _, last = (cell.run for cell in grid.cells)

    class Another(Lock):
        def __enter__(self):
            if self.folder == first.folder.path:
                raise BusyError(f"{self.folder} is in use: process 1 on elsewhere.\n  Wait for it.")
            if self.folder == last.folder.path:  # it was finished just before we got it
                finish(last)
            return super().__enter__()

    monkeypatch.setattr("poisonshield.engine.runfolder.Lock", Another)
    grid.train_part()
    assert trained == [32]
    assert "is in use: process 1 on elsewhere.\n  Passed over" in caplog.text
    assert (grid.folder / "table.md").read_text().count("1 of 1") == 2


def test_grid_leaves_files_of_others_alone(tmp_path, grid):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"results\.csv is there and was not made here"):
        grid.train_part()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["results.csv"]
    assert (tmp_path / "runs" / "results.csv").read_text() == "mine"


def test_two_of_a_run_share_nothing_of_its_folder(tmp_path):
    """The lock is taken before data is opened."""
    run = read_experiment(MINI, [*SMALL, "data.train=nowhere", "data.poison=null", f"run.dir={tmp_path / 'run'}"])
    held = {"host": "elsewhere", "pid": 7, "since": "now"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps(held))
    with pytest.raises(BusyError, match="process 7 on elsewhere"):
        run.train()

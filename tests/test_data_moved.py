"""Data that lies elsewhere now: a run goes on and is evaluated as long as it is the same, from any folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from poisonshield.api import evaluate, train
from poisonshield.data import open_dataset
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import ConfigError, PoisonShieldError

MINI = str(Path(__file__).resolve().parents[1] / "configs" / "defend" / "vespr_cifar10_mini.yaml")
SMALL = [
    "engine.device=cpu", "model.widths=[8,8,8,8]", "method.hidden=16", "method.out=16", "data.batch_size=16",
    "data.poison=null", "defenses=[]", "evaluate.robust=null", "evaluate.knn=null", "evaluate.linear=null",
    "evaluate.alignment=null", "evaluate.pairs=null",
]  # fmt: skip


def write_set(folder, first):
    for split, rows in (("train", range(first, first + 64)), ("test", range(200, 232))):
        source = open_dataset("cifar10-mini", "train")
        with ShardWriter(folder / split, classes=source.classes, image_size=(32, 32)) as writer:
            for i, image in zip(rows, source.read(torch.tensor(list(rows))), strict=True):
                writer.write(source.keys[i], image, int(source.labels[i]))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A short run on `data`, given by a relative path, from the folder `here`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_set(Path("data"), 0)
    return train(MINI, [*SMALL, "engine.max_steps=2", "data.train=data", "run.dir=../run"]).resolve()


def test_evaluate_works_from_another_folder_and_where_the_data_went(run, tmp_path, monkeypatch):
    """faults B: `evaluate` from another folder fails on relative paths; data moved to another mount."""
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == str(tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "there")
    evaluate(run)
    shutil.move(tmp_path / "here" / "data", tmp_path / "there" / "moved")
    evaluate(run, ["data.train=moved"])
    (row,) = json.loads((run / "results.json").read_text())
    assert row["data"] == "data"  # one run, one row, under its first name


def test_resumed_run_takes_the_same_data_wherever_it_lies(run, tmp_path, monkeypatch):
    shutil.move(tmp_path / "here" / "data", tmp_path / "there" / "moved")
    monkeypatch.chdir(tmp_path / "there")
    train(MINI, [*SMALL, "engine.max_steps=4", "engine.resume=auto", "data.train=moved", f"run.dir={run}"])
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == str(tmp_path / "there" / "moved")
    assert len(json.loads((run / "results.json").read_text())) == 1


@pytest.mark.parametrize("act", ["resume", "evaluate"])
def test_other_data_is_refused_and_nothing_is_changed(run, tmp_path, act):
    write_set(tmp_path / "other", 64)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(PoisonShieldError, match=r"data\.train|holds a run on other data"):
        if act == "evaluate":
            evaluate(run, [f"data.train={tmp_path / 'other'}"])
        else:
            over = ["engine.max_steps=4", "engine.resume=auto", f"data.train={tmp_path / 'other'}", f"run.dir={run}"]
            train(MINI, [*SMALL, *over])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_what_else_a_run_was_trained_with_does_not_move(run):
    with pytest.raises(ConfigError, match="keeps what it was trained with"):
        evaluate(run, ["data.train=nowhere"])

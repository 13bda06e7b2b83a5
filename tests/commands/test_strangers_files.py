"""Every command that writes, pointed at a folder with somebody's files: they stay, whatever it may overwrite."""

import json
from pathlib import Path

import pytest
import yaml

from poisonshield.api import demo, demo_szt
from poisonshield.errors import PoisonShieldError
from poisonshield.files import MADE_LIST
from poisonshield.runs import read_experiment

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINI, LSP = str(CONFIGS / "defend" / "vespr_cifar10_mini.yaml"), str(CONFIGS / "poison" / "lsp_cifar10_mini.yaml")
WORD, PIPELINE = str(CONFIGS / "invert" / "rendered.yaml"), str(CONFIGS / "pretrain" / "rendered.yaml")
THEIRS = (
    "checkpoints/step-00000003/a", "export/a", "validation/a", "tensorboard/a", "pictures/a.png", "concepts/a.png",
    "train/a.jpg", "pipeline/model_index.json", "poisoned/a", "metrics.jsonl", "results.json", "results.csv",
    "table.md", "samples.png", "report.html", "lsp.poison.safetensors", "notes.txt",
)  # fmt: skip


def poison_words(folder):
    over = ["data.poison={name: advdm, steps: 1}", f"run.dir={folder}", "run.overwrite=true"]
    read_experiment(WORD, over).write_poison()


def run_grid(folder):
    path = folder.parent / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": MINI, "dir": str(folder), "blocks": [{"data.batch_size": [16]}]}))
    read_experiment(path).train()


ACTIONS = {
    "train": lambda folder: read_experiment(MINI, [f"run.dir={folder}", "run.overwrite=true"]).train(),
    "train words": lambda folder: read_experiment(WORD, [f"run.dir={folder}", "run.overwrite=true"]).train(),
    "train a pipeline": lambda folder: read_experiment(PIPELINE, [f"run.dir={folder}", "run.overwrite=true"]).train(),
    "grid": run_grid,
    "poison": lambda folder: read_experiment(LSP, [f"run.dir={folder}", "run.overwrite=true"]).write_poison(),
    "poison, recipe": lambda folder: read_experiment(
        LSP, [f"run.dir={folder}", "run.overwrite=true", "release.format=recipe"]
    ).write_poison(),
    "poison words": poison_words,
    "demo vespr": lambda folder: demo.demo(folder),
    "demo szt": lambda folder: demo_szt.demo(folder),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_files_of_others_stay_as_they_are(tmp_path, action):
    """faults B: the folder of no run was emptied."""
    folder = tmp_path / "mine"
    for name in THEIRS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("work of years")
    with pytest.raises(PoisonShieldError) as error:
        ACTIONS[action](folder)
    assert str(folder) in str(error.value)
    left = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert left == dict.fromkeys(THEIRS, "work of years")


def test_demo_may_be_run_again_where_it_ran(tmp_path):
    from poisonshield.api.stories import claim_folder

    for _ in range(2):
        claim_folder(tmp_path, ("results.json", "report.html"), demo.STORIES)
        (tmp_path / "results.json").write_text("[]")
    assert json.loads((tmp_path / MADE_LIST).read_text())["made"] == ["report.html", "results.json"]

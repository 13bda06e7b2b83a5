"""The ImageNet-100 recipes from end to end, on a made-up tree of that shape: class folders, a class list, odd sizes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from poisonshield.cli import main
from poisonshield.data import ShardSet

ROOT = Path(__file__).resolve().parents[1]
CLASSES = [f"n{i:08d}" for i in range(100)]
LIGHT = ["data.batch_size=4", "data.workers=0", "engine.precision=fp32", "engine.max_steps=1", "engine.device=cpu",
         "engine.log_every_steps=1", "evaluate.robust=null", "evaluate.alignment=null", "evaluate.linear=null",
         "evaluate.batch_size=25"]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """105 class folders with a training photo and a test photo; JPEG, sides of 225 to 300."""
    root, draw = tmp_path_factory.mktemp("imagenet"), torch.Generator().manual_seed(0)
    for folder in [*CLASSES, *(f"x{i:08d}" for i in range(5))]:
        for split, count in (("train", 1), ("val", 1)):
            for i in range(count):
                path = root / split / folder / f"{folder}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                height, width = torch.randint(225, 300, (2,), generator=draw).tolist()
                small = torch.randint(0, 256, (9, 9, 3), generator=draw).to(torch.uint8)
                Image.fromarray(small.numpy()).resize((width, height)).save(path, quality=90)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture(scope="module")
def imported(tree):
    out = tree.parent / "imagenet100"
    arguments = ["--class-list", tree / "classes.txt", "--size", 224, "--jpeg-quality", 95, "--out", out]
    command(["data", "import", tree, *arguments])
    return out


def command(arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    assert not end.value.code


def test_import_takes_the_listed_classes_at_224_pixels(imported):
    train, test = ShardSet.open(imported / "train"), ShardSet.open(imported / "test")
    assert train.classes == test.classes == tuple(CLASSES)
    assert (len(train), len(test), train.image_size) == (100, 100, (224, 224))
    assert train.extension(0) == "jpg"


def test_poison_then_vespr_runs_on_it(imported, tmp_path):
    command(["poison", ROOT / "configs/poison/lsp_in100.yaml", f"data.train={imported}", f"run.dir={tmp_path / 'lsp'}"])
    poisoned = ShardSet.open(tmp_path / "lsp" / "train")
    measured = poisoned.manifest.poison["measured"]
    assert poisoned.manifest.poison["poisoned"] == 100
    assert measured["l2_max"] == pytest.approx(16 / 255 * (3 * 224 * 224) ** 0.5, rel=0.02)
    data = [f"data.train={tmp_path / 'lsp' / 'train'}", f"data.test={imported}"]
    attack = ["defenses.0.attack.steps=1", f"run.dir={tmp_path / 'vespr'}"]
    command(["train", ROOT / "configs/defend/vespr_in100.yaml", *data, *LIGHT, *attack])
    (row,) = json.loads((tmp_path / "vespr" / "results.json").read_text())
    assert (row["poison"], row["method"], row["defense"], row["steps"]) == ("lsp", "simclr", "vespr", 1)

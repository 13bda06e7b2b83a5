"""`poisonshield data audit-epoch` on runs of images: a line an epoch, and status 1 where one is not whole."""

import json
import shutil

import pytest
from PIL import Image
from runs import MINI, fit, opened

from poisonshield.cli import main

OVERRIDES = (
    "data.poison=null", "defenses=[]", "method.hidden=8", "method.out=8", "model.widths=[8,8,8,8]", "data.batch_size=5",
    "engine.max_steps=7", "engine.log_every_steps=2", "engine.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs and one more batch on 14 images, in batches of 5, 5 and 4."""
    root = tmp_path_factory.mktemp("audit")
    for split, count in (("train", 7), ("test", 2)):
        for i, name in enumerate(("cat", "dog")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for j in range(count):
                Image.new("RGB", (32, 32), (40 * i, 30 * j, 20)).save(folder / f"{j}.png")
    with pytest.raises(SystemExit):
        main(["data", "import", str(root / "photos"), "--out", str(root / "set")])
    mine = (*OVERRIDES, f"data.train={root / 'set'}")
    fit(root / "run", mine, data=opened(MINI, *mine))
    return root / "run"


def ask(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["data", "audit-epoch", *map(str, arguments)])
    printed = capsys.readouterr()
    return left.value.code or 0, printed.out, printed.err


def test_good_run_is_proved_a_line_an_epoch(run, capsys):
    status, out, err = ask(capsys, run)
    assert status == 0, out + err
    lines = out.splitlines()
    assert len(lines) == 3 and all(f"epoch {e}: 14 samples, each once, digest " in lines[e] for e in (0, 1))
    assert lines[2].startswith("epoch 2: 5 samples of 14; it has not ended, each once, digest ")


def test_run_that_was_tampered_with_ends_with_status_1(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = next(entry for row in rows for entry in row.get("samples", []) if entry["epoch"] == 1)
    changed["count"] -= 1
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = ask(capsys, copy)
    assert status == 1 and "epoch 1: 13 samples, 1 of 14 were not trained on" in out
    assert out.splitlines()[-1] == "1 of 3 epochs did not train on each sample once"


def test_other_data_than_the_runs_is_refused(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / ".poisonshield.data.json").write_text(json.dumps({"data.train": "0" * 64}))
    status, _, err = ask(capsys, copy)
    assert status == 1 and "holds a run on other data" in err


def test_folder_without_a_run_is_refused(tmp_path, capsys):
    status, _, err = ask(capsys, tmp_path)
    assert status == 1 and "is not a finished run" in err

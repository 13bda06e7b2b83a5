"""What users get wrong, as they would meet it: one worded error, soon, and before any process group starts.

Two ranks are announced that never come: a run that tried to meet them before it checked would hang for half an hour.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from poisonshield.data import open_dataset
from poisonshield.data.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
MINI = str(ROOT / "configs" / "defend" / "vespr_cifar10_mini.yaml")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """60 training and 20 test JPEG files in shards of 20."""
    folder, source = tmp_path_factory.mktemp("good"), open_dataset("cifar10-mini")
    for split, rows in (("train", range(60)), ("test", range(60, 80))):
        with ShardWriter(folder / split, classes=source.classes, image_size=(32, 32), samples_per_shard=20) as writer:
            for i in rows:
                writer.write_encoded(source.keys[i], *source.encoded(torch.tensor([i])), "jpg", int(source.labels[i]))
    return folder


@pytest.fixture
def data(good, tmp_path):
    shutil.copytree(good, tmp_path / "data")
    return tmp_path / "data"


def run(*overrides, ranks=2):
    """(seconds, exit status, what was said) of `launch/train.py`, as rank 0 of two; python's own start not counted."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": "29571", "OMP_NUM_THREADS": "1"}  # fmt: skip
    code = "import sys, time; import torch; start = time.monotonic(); sys.argv = sys.argv[1:]; import runpy\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('SECONDS', time.monotonic() - start)"
    command = [sys.executable, "-c", code, str(ROOT / "launch" / "train.py"), MINI, "engine.device=cpu", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    seconds = float(done.stdout.split("SECONDS")[1])
    return seconds, done.returncode, done.stderr


def said(*overrides):
    seconds, status, text = run(*overrides)
    assert status == 1 and "Traceback" not in text, text
    print(f"{seconds:.1f} s")  # a busy machine may be slow; one that waits for the other rank is slower by minutes
    assert seconds < 30, f"{seconds:.1f} s: {text}"
    return text


def rehash(folder):
    """A manifest that fits the files again, so that what is inside them is looked at."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["shards"]:
        raw = (folder / name).read_bytes()
        manifest["shards"][name] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_member(folder, shard, ending, change):
    """Write one tar again with the bytes of its first member of this ending changed."""
    old, done = folder / shard, False
    new = old.with_suffix(".new")
    with tarfile.open(old) as source, tarfile.open(new, "w") as target:
        for member in source:
            raw = source.extractfile(member).read()
            if member.name.endswith(ending) and not done:
                raw, done, name = change(raw), True, member.name
                member.size = len(raw)
            target.addfile(member, io.BytesIO(raw))
    new.replace(old)
    rehash(folder)
    return name.rpartition(".")[0]


def test_unknown_key():
    text = said("defenses.0.attack.step_sise=1/255")
    assert "defenses[0].attack: step_sise is not a setting of pgd. Did you mean step_size?  Settings: random" in text


def test_wrong_type():
    assert "seed: Input should be a valid integer" in said("seed=often")


def test_eps_in_levels():
    text = said("defenses.0.eps=4")
    assert "defenses[0].eps: 4 is outside [0, 1]: budgets are in pixel units. Did you mean 4/255?" in text


def test_unknown_network():
    assert "model.name: 'resnet81' is not a timm model. Did you mean resnet18?" in said("model.name=resnet81")


def test_poisoned_test_images(data, tmp_path):
    manifest = json.loads((data / "test" / "manifest.json").read_text()) | {"poison": {"name": "lsp"}}
    (data / "test" / "manifest.json").write_text(json.dumps(manifest))
    assert "is poisoned, and accuracy is measured on clean images only" in said(f"data.train={data}")


def test_poisoning_twice(data):
    manifest = json.loads((data / "train" / "manifest.json").read_text()) | {"poison": {"name": "lsp"}}
    (data / "train" / "manifest.json").write_text(json.dumps(manifest))
    assert "is poisoned already (lsp), and data.poison would poison it again" in said(f"data.train={data}")


def test_broken_test_image(data):
    key = change_member(data / "test", "shard-00000.tar", ".jpg", lambda raw: raw[: len(raw) // 2])
    assert f"sample {key} in shard-00000.tar" in said(f"data.train={data}")


def test_missing_shard(data):
    (data / "train" / "shard-00001.tar").unlink()
    text = said(f"data.train={data}")
    assert text.startswith("DataError: ") and "shard-00001.tar" in text and "missing" in text


def test_truncated_tar(data):
    path = data / "train" / "shard-00002.tar"
    path.write_bytes(path.read_bytes()[:20000])
    text = said(f"data.train={data}")
    assert "shard-00002.tar ends early" in text and "at sample" in text and "Copy the shard again" in text


def test_one_broken_image(data):
    key = change_member(data / "train", "shard-00001.tar", ".jpg", lambda raw: raw[: len(raw) // 2])
    text = said(f"data.train={data}")
    assert f"sample {key} in shard-00001.tar" in text and "not a whole JPG image" in text


def test_label_outside_the_classes(data):
    key = change_member(data / "train", "shard-00000.tar", ".cls", lambda raw: b"10")
    text = said(f"data.train={data}")
    assert key in text and "shard-00000.tar" in text and "0 to 9" in text


def test_missing_config_file():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "configs/none.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "configs/none.yaml does not exist" in done.stderr


def test_good_data_is_trained_on(data, tmp_path):
    _, status, text = run(
        f"data.train={data}", f"run.dir={tmp_path / 'run'}", "engine.max_steps=1", "data.batch_size=20",
        "model.widths=[8,8,8,8]", "evaluate.robust=null", ranks=1,
    )  # fmt: skip
    assert status == 0, text
    assert (tmp_path / "run" / "results.json").is_file()

"""What users get wrong, as they would meet it: one worded error, soon, and before any process group starts.

Two ranks are announced and one comes: a run that looked for the other before it checked would hang for half an hour.
"""

import hashlib
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from dist import free_port

from poisonshield import api
from poisonshield.cli import main
from poisonshield.data import open_dataset
from poisonshield.data.writer import ShardWriter
from poisonshield.engine.meeting import Meeting
from poisonshield.errors import PoisonShieldError
from poisonshield.runs import read_experiment

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


def launch(config, *overrides):
    """`launch/train.py` in this process; the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", str(config), *overrides])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    return end.value.code


@pytest.fixture
def said(monkeypatch, capsys):
    """`said(overrides)`: what rank 0 of two is told before it would look for the other, whom nobody started."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks["MASTER_PORT"] = str(free_port())
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Meeting, "agree", lambda *_: pytest.fail("it looked for rank 1"))

    def ask(*overrides, config=MINI):
        assert launch(config, "engine.device=cpu", *overrides) == 1
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    return ask


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


def test_unknown_key(said):
    text = said("defenses.0.attack.step_sise=1/255")
    assert (
        "defenses[0].attack: step_sise is not a setting of pgd. Did you mean step_size?  Settings: graph, random"
        in text
    )


def test_wrong_type(said):
    assert "seed: Input should be a valid integer" in said("seed=often")


def test_eps_in_levels(said):
    text = said("defenses.0.eps=4")
    assert "defenses[0].eps: 4 is outside [0, 1]: budgets are in pixel units. Did you mean 4/255?" in text


def test_unknown_network(said):
    assert "model.name: 'resnet81' is not a timm model. Did you mean resnet18?" in said("model.name=resnet81")


def test_poisoned_test_images(data, tmp_path, said):
    manifest = json.loads((data / "test" / "manifest.json").read_text()) | {"poison": {"name": "lsp"}}
    (data / "test" / "manifest.json").write_text(json.dumps(manifest))
    assert "is poisoned, and accuracy is measured on clean images only" in said(
        f"data.train={data}", "data.poison=null"
    )


def test_poisoning_twice(data, said):
    manifest = json.loads((data / "train" / "manifest.json").read_text()) | {"poison": {"name": "lsp"}}
    (data / "train" / "manifest.json").write_text(json.dumps(manifest))
    assert "is poisoned already (lsp), and data.poison would poison it again" in said(
        f"data.train={data}", "data.poison=regions"
    )


PLANTERS = (
    "defend/vespr_cifar10_mini", "defend/jpeg_cifar10_mini", "evaluate/linear_probe_cifar10_mini",
    "poison/lsp_cifar10_mini", "invert/szt_rendered",
)  # fmt: skip


@pytest.mark.parametrize("config", PLANTERS)
@pytest.mark.parametrize("how", ["override", "child", "grid"])
def test_a_configs_poison_is_not_planted_into_other_data(data, tmp_path, capsys, config, how):
    """faults A: `train configs/defend/vespr_cifar10_mini.yaml data.train=OWN` trained on OWN with `regions` in it."""
    base, file = ROOT / "configs" / f"{config}.yaml", tmp_path / "file.yaml"
    asked = [config, f"data.train={data}"] if how == "override" else [str(file)]
    if how == "child":
        file.write_text(f"extends: {base}\ndata: {{train: '{data}'}}\n")
    elif how == "grid":
        settings = f"settings: {{data.train: '{data}'}}"
        file.write_text(f"base: {base}\ndir: x\n{settings}\nblocks: [{{run.overwrite: [true]}}]\n")
    with pytest.raises(SystemExit) as end:
        main(["train", *asked, "--print-config"])
    told = capsys.readouterr().err
    assert end.value.code == 1 and "would be planted into these" in told and "data.poison=null" in told


@pytest.mark.parametrize(
    "said_so", ["data.poison=null", "data.poison=ar", "data.poison.name=regions", "data.poison.eps=4/255"]
)
def test_a_poison_that_is_said_goes_with_any_data(data, said_so):
    read_experiment(MINI, [f"data.train={data}", said_so]).refuse_planting()


def test_data_that_is_named_again_is_not_other_data():
    read_experiment(MINI, ["data.train=cifar10-mini"]).refuse_planting()


def test_a_run_that_goes_on_from_its_own_record_asks_nothing(tmp_path):
    record = tmp_path / "config.yaml"
    record.write_text(yaml.safe_dump(json.loads(json.dumps(read_experiment(MINI).record))))
    read_experiment(record).refuse_planting()


def test_the_config_for_own_images_asks_for_them(said):
    text = said(config="defend/vespr_own")
    assert "it takes images of your own" in text and "data import" in text and "data.train=DATA" in text


@pytest.mark.parametrize(
    ("config", "overrides", "told"),
    [
        (
            "FOLDER",
            (),
            ["FOLDER is a folder; a config is wanted", "data import FOLDER", "train defend/vespr_own data.train="],
        ),
        (
            "grid/vespr_cifar10_mini",
            ("run.dir=x", "engine.epochs=1", "data.train=y", "method.name=byol"),
            [
                "is a grid of runs",
                "run, engine, data, method is not a setting of a grid",
                "settings={engine.epochs: 2}",
            ],
        ),
        ("defend/vespr_cifar10_mini", ("method.hidden=4294967296",), ["method: no network has such sizes"]),
        ("invert/szt", ("method.name=textual_inversoin",), ["Did you mean textual_inversion?"]),
        ("defend/vespr_cifar10_mini", ("model.name=resnet81",), ["not a timm model. Did you mean resnet18?"]),
        ("invert/rendered", ("seed=18446744073709551616",), ["seed=18446744073709551616", "is beyond 64 bits"]),
    ],
)
@pytest.mark.parametrize("more", [(), ("--print-config",)])
def test_one_error_in_words(tmp_path, capsys, monkeypatch, config, overrides, told, more):
    """faults E: a folder, a grid's file with a run's settings, a method's typo, no such backbone. C: a seed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["train", config, *overrides, *more])
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.count("\n") <= 5 and text.startswith("ConfigError: "), text
    assert all(words in text for words in told), text


def test_images_of_several_sizes_are_called_so(good, tmp_path, said):
    """faults E: "images are None"."""
    shutil.copytree(good, tmp_path / "mixed")
    path = tmp_path / "mixed" / "test" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": None}))
    text = said(f"data.train={tmp_path / 'mixed'}", "data.poison=null")
    assert "are of several sizes" in text and "are 32 x 32 (height x width)" in text and "None" not in text


def test_a_rank_that_fails_says_so_in_one_line_with_its_traceback_in_a_file(tmp_path, capsys, monkeypatch):
    """faults E: 130 lines of traceback on every rank when one is lost."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    message = "[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer\nframe #0: c10::Error"

    def lose(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr("poisonshield.api.train", lose)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit) as end:
        main(["train", MINI])
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.count("\n") == 1 and "Traceback" not in text
    assert (
        text.startswith("rank 3 of 8 on ")
        and "RuntimeError: " in text
        and "Connection closed by peer (its traceback" in text
    )
    assert "in lose" in (tmp_path / "poisonshield-rank-3.traceback.txt").read_text()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError):  # alone, it is a fault of ours and shown whole
        main(["train", MINI])


def test_broken_test_image(data, said):
    key = change_member(data / "test", "shard-00000.tar", ".jpg", lambda raw: raw[: len(raw) // 2])
    assert f"sample {key} in shard-00000.tar" in said(f"data.train={data}", "data.poison=null")


def test_missing_shard(data, said):
    (data / "train" / "shard-00001.tar").unlink()
    text = said(f"data.train={data}", "data.poison=null")
    assert (
        text.startswith(f"rank 0 of 2 on {socket.gethostname()}: DataError: ")
        and "shard-00001.tar" in text
        and "missing" in text
    )


def test_truncated_tar(data, said):
    path = data / "train" / "shard-00002.tar"
    path.write_bytes(path.read_bytes()[:20000])
    text = said(f"data.train={data}", "data.poison=null")
    assert "shard-00002.tar ends early" in text and "at sample" in text and "Copy the shard again" in text


def test_one_broken_image(data, said):
    key = change_member(data / "train", "shard-00001.tar", ".jpg", lambda raw: raw[: len(raw) // 2])
    text = said(f"data.train={data}", "data.poison=null")
    assert f"sample {key} in shard-00001.tar" in text and "not a whole JPG image" in text


def test_label_outside_the_classes(data, said):
    key = change_member(data / "train", "shard-00000.tar", ".cls", lambda raw: b"10")
    text = said(f"data.train={data}", "data.poison=null")
    assert key in text and "shard-00000.tar" in text and "0 to 9" in text


def test_missing_config_file(capsys):
    assert launch("configs/none.yaml") == 1 and "configs/none.yaml does not exist" in capsys.readouterr().err


def test_rank_0_alone_would_look_for_rank_1(data, tmp_path, said):
    """Without a mistake it does, so that the other tests would notice a check that comes too late."""
    with pytest.raises(pytest.fail.Exception, match="it looked for rank 1"):
        said(f"data.train={data}", "data.poison=null", f"run.dir={tmp_path / 'run'}")


def test_good_data_is_trained_on(data, tmp_path):
    """Started as a launcher does, in a process of its own."""
    overrides = (
        f"data.train={data}", "data.poison=null", f"run.dir={tmp_path / 'run'}", "engine.device=cpu",
        "engine.max_steps=1",
        "data.batch_size=20", "model.widths=[8,8,8,8]", "evaluate.robust=null",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "train.py"), MINI, *overrides]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize(
    "override", ["data.train={}", "run.dir={}", "engine.resume={}", "data.poison={}", "method.weights={}"]
)
def test_a_name_that_no_disk_takes_is_told_in_words(override, tmp_path):
    """pathlib raises OSError where it is asked whether such a file exists."""
    settings = [f"run.dir={tmp_path / 'run'}", "data.poison=null", override.format("x" * 300)]
    with pytest.raises(PoisonShieldError):
        api.train("defend/vespr_cifar10_mini", settings)


@pytest.mark.parametrize("setting", ["data.train", "model.pipeline", "generate.clean"])
def test_a_long_name_in_a_words_config_is_told_too(setting, tmp_path):
    with pytest.raises(PoisonShieldError):
        api.train("invert/szt_rendered", [f"run.dir={tmp_path / 'run'}", f"{setting}={'x' * 300}"])

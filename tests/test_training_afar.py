"""A training from a web server that fails, cuts and dawdles is the training from disk, to the last bit."""

from pathlib import Path

import pytest
import torch
from far_server import far_server
from safetensors.torch import load_file

from poisonshield.api import train
from poisonshield.data import open_dataset, remote
from poisonshield.data.writer import ShardWriter

MINI = str(Path(__file__).resolve().parents[1] / "configs" / "defend" / "vespr_cifar10_mini.yaml")
SMALL = [
    "engine.device=cpu", "model.widths=[8,8,8,8]", "method.hidden=16", "method.out=16", "data.batch_size=16",
    "data.poison=null", "defenses=[]", "evaluate.robust=null", "evaluate.knn=null", "evaluate.linear=null",
    "evaluate.alignment=null", "evaluate.pairs=null", "engine.max_steps=6", "data.source=tar",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images for training in 8 shards, and 32 to test on."""
    folder, source = tmp_path_factory.mktemp("data"), open_dataset("cifar10-mini", "train")
    for split, rows in (("train", range(64)), ("test", range(200, 232))):
        writer = ShardWriter(folder / split, classes=source.classes, image_size=(32, 32), samples_per_shard=8)
        with writer:
            for i, image in zip(rows, source.read(torch.tensor(list(rows))), strict=True):
                writer.write(source.keys[i], image, int(source.labels[i]))
    return folder


@pytest.mark.parametrize("order", [["data.window=2"], ["data.lanes=4", "data.verify=lazy", "data.workers=1"]])
def test_training_from_afar_is_that_from_disk(folder, tmp_path, monkeypatch, order):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    near = train(MINI, [*SMALL, *order, f"data.train={folder}", f"run.dir={tmp_path / 'near'}"])
    with far_server(folder) as (address, server):
        server.fail_every, server.cut_every, server.pause = 10, 4, 0.002
        limit = 3 * max(p.stat().st_size for p in folder.rglob("*.tar")) / 2**30
        afar = train(
            MINI, [*SMALL, *order, f"data.train={address}", f"data.cache={limit}", f"run.dir={tmp_path / 'afar'}"]
        )
    weights = [load_file(run / "export" / "method.safetensors") for run in (near, afar)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])

"""`poisonshield poison`: what is written is what the recipe gives, measured, lossless, and found again by key."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from poisonshield.api import poison
from poisonshield.data import ShardSet, open_dataset
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import BudgetError, ConfigError, DataError
from poisonshield.poisons.base import KeyedPoison
from poisonshield.runs import read_experiment
from poisonshield.runs.parts import shards
from poisonshield.runs.parts.image_data import build_training_set, open_data

LSP = str(Path(__file__).resolve().parents[2] / "configs" / "poison" / "lsp_cifar10_mini.yaml")
FAST = ["lsp", "one_pixel", "convolution", "regions", "class_noise"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """300 bundled images as a set of their own, train and test: real pixels, a second's work."""
    folder = tmp_path_factory.mktemp("small")
    for split, rows in (("train", range(300)), ("test", range(300, 400))):
        source = open_dataset("cifar10-mini", "train")
        pixels = source.read(torch.tensor(list(rows)))
        with ShardWriter(folder / split, classes=source.classes, image_size=(32, 32), samples_per_shard=100) as writer:
            for i, image in zip(rows, pixels, strict=True):
                writer.write(source.keys[i], image, int(source.labels[i]))
    return folder


def pixels(source):
    return dict(zip(source.keys, source.read(torch.arange(len(source))), strict=True))


@pytest.fixture(scope="module", params=FAST)
def written(request, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "run"
    poison(LSP, [f"data.train={small}", f"data.poison.name={request.param}", f"run.dir={out}"])
    return request.param, out


def test_shards_hold_the_same_keys_and_labels_and_lossless_images(written, small):
    _, out = written
    clean, written = ShardSet.open(small / "train"), ShardSet.open(out / "train")
    assert dict(zip(written.keys, written.labels.tolist(), strict=True)) == dict(
        zip(clean.keys, clean.labels.tolist(), strict=True)
    )
    assert {written.extension(i) for i in range(len(written))} == {"png"}


def test_recipe_and_shards_give_the_same_pixels(written, small):
    name, out = written
    run = read_experiment(
        LSP, [f"data.train={small}", f"data.poison={out / name}.poison.safetensors", "run.dir=unused"]
    )
    batches = build_training_set(run, open_data(run)).batches(64, torch.device("cpu"))
    loaded = {k: x for b in batches for k, x in zip(b.keys, (b.x * 255).round().to(torch.uint8), strict=True)}
    written = pixels(ShardSet.open(out / "train"))
    assert loaded.keys() == written.keys() and all(torch.equal(loaded[k], written[k]) for k in written)
    assert any(not torch.equal(written[k], v) for k, v in pixels(ShardSet.open(small / "train")).items())


def test_manifest_states_what_was_measured_on_the_stored_pixels(written, small):
    name, out = written
    poison = ShardSet.open(out / "train").manifest.poison
    before, after = pixels(ShardSet.open(small / "train")), pixels(ShardSet.open(out / "train"))
    change = {k: (after[k].int() - before[k].int()) for k in before}
    assert poison["name"] == name and poison["poisoned"] == 300 and sum(poison["poisoned_per_class"].values()) == 300
    assert poison["clean_data"] == ShardSet.open(small / "train").digest
    assert poison["measured"]["linf_levels"] == max(int(c.abs().max()) for c in change.values())
    assert poison["measured"]["l0_max"] == max(int((c != 0).any(0).sum()) for c in change.values())
    l2 = max(float(c.double().square().sum().sqrt()) for c in change.values()) / 255
    assert poison["measured"]["l2_max"] == pytest.approx(l2, abs=2e-6)


def test_order_of_the_files_does_not_matter(small, tmp_path):
    """The same images in other shards, in reverse: every key gets the same poisoned pixels."""
    source = open_dataset(small, "train")
    shutil.copytree(small / "test", tmp_path / "turned" / "test")
    with ShardWriter(
        tmp_path / "turned" / "train", classes=source.classes, image_size=(32, 32), samples_per_shard=70
    ) as w:
        for i in reversed(range(len(source))):
            w.write(source.keys[i], source.decode(i), int(source.labels[i]))
    written = []
    for name, data in (("a", small), ("b", tmp_path / "turned")):
        out = poison(LSP, [f"data.train={data}", f"run.dir={tmp_path / name}"])
        written.append(pixels(ShardSet.open(out / "train")))
    assert all(torch.equal(written[0][k], written[1][k]) for k in written[0])


def test_ratio_leaves_the_rest_as_it_was(small, tmp_path):
    out = poison(LSP, [f"data.train={small}", "data.poison_ratio=0.25", f"run.dir={tmp_path / 'run'}"])
    before, after = pixels(ShardSet.open(small / "train")), pixels(ShardSet.open(out / "train"))
    assert sum(not torch.equal(before[k], after[k]) for k in before) == 75
    assert ShardSet.open(out / "train").manifest.poison["poisoned"] == 75


def test_lossy_format_for_poisoned_pixels_is_refused(tmp_path):
    with ShardWriter(tmp_path / "x", classes=["a"], image_size=(4, 4), poison={"name": "lsp"}) as writer:
        with pytest.raises(DataError, match="Lossy compression is itself a defense"):
            writer.write_encoded("k", b"...", "jpg", 0)
        writer.write("k", torch.zeros(3, 4, 4, dtype=torch.uint8), 0)


def test_what_breaks_its_budget_is_no_data_set_afterwards(small, tmp_path, monkeypatch):
    apply = KeyedPoison.apply
    monkeypatch.setattr(KeyedPoison, "apply", lambda self, batch: apply(self, batch).replace(x=1 - batch.x))
    with pytest.raises(BudgetError, match="poison lsp allows"):
        poison(LSP, [f"data.train={small}", f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "train" / "manifest.json").exists()


def test_existing_set_is_kept_unless_overwrite_is_asked_for(written, small):
    name, out = written
    before = (out / "train" / "manifest.json").read_text()
    with pytest.raises(ConfigError, match="holds a data set already"):
        poison(LSP, [f"data.train={small}", f"data.poison.name={name}", f"run.dir={out}"])
    assert (out / "train" / "manifest.json").read_text() == before
    again = [f"data.train={small}", f"data.poison.name={name}", f"run.dir={out}", "run.overwrite=true"]
    poison(LSP, again)
    assert json.loads((out / "train" / "manifest.json").read_text()) == json.loads(before)


def test_config_without_a_poison_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names no poison to write"):
        poison(LSP, ["data.poison=null", f"run.dir={tmp_path}"])


def test_memory_is_that_of_one_chunk(small, tmp_path, monkeypatch):
    """Never more images at once than a chunk, however many there are."""
    sizes = []
    apply = KeyedPoison.apply
    monkeypatch.setattr(KeyedPoison, "apply", lambda self, batch: sizes.append(len(batch)) or apply(self, batch))
    monkeypatch.setattr(shards, "CHUNK_PIXELS", 64 * 32 * 32)
    poison(LSP, [f"data.train={small}", f"run.dir={tmp_path / 'run'}"])
    assert max(sizes) == 64 and sum(sizes) == 300

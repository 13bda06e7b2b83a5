"""cifar10-mini: small, balanced, honest about where it comes from, and drawn again bit for bit."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from made import contents, picture, pixels_of, write_tar

import poisonshield
from poisonshield.data import ShardSet, bundled_names, open_dataset
from poisonshield.data.bundled import draw
from poisonshield.errors import DataError

FOLDER = Path(poisonshield.__file__).parent / "data" / "bundled" / "cifar10-mini"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
COUNTS = {"train": 5000, "test": 1000}


@pytest.fixture(scope="module")
def mini():
    return {split: open_dataset("cifar10-mini", split) for split in COUNTS}


def test_it_is_found_by_its_name():
    assert "cifar10-mini" in bundled_names()
    assert open_dataset("cifar10-mini", "test").folder == FOLDER / "test"


@pytest.mark.parametrize("split", COUNTS)
def test_classes_are_balanced(mini, split):
    shards = mini[split]
    assert len(shards) == COUNTS[split] and list(shards.classes) == CLASSES
    assert shards.labels.bincount().tolist() == [COUNTS[split] // 10] * 10


def test_it_stays_small():
    shipped = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert len(shipped) >= 4 and sum(p.stat().st_size for p in shipped) <= 3e6


def test_no_image_is_in_both_splits(mini):
    assert not set(mini["train"].keys) & set(mini["test"].keys)
    files = {split: set(s.encoded(torch.arange(len(s)))) for split, s in mini.items()}
    assert not files["train"] & files["test"]


@pytest.mark.parametrize("split", COUNTS)
def test_provenance_states_source_draw_and_that_pixels_are_not_the_official_ones(split):
    manifest = json.loads((FOLDER / split / "manifest.json").read_text())
    for words in ("CIFAR-10 (Krizhevsky 2009", "drawn with seed 0", "JPEG copies", "near them, not equal"):
        assert words in manifest["provenance"]
    assert manifest["provenance"].startswith(f"{COUNTS[split]:,} of the ") and manifest["poison"] is None


@pytest.mark.parametrize("split", COUNTS)
def test_all_pixels_are_32x32_and_no_image_is_blank(mini, split):
    pixels = mini[split].read(torch.arange(0, COUNTS[split], 20))
    assert mini[split].image_size == (32, 32) and pixels.shape[1:] == (3, 32, 32)
    assert pixels.flatten(1).float().std(1).min() > 3


def test_pixels_are_those_that_pillow_sees(mini):
    files = contents(FOLDER / "test" / "shard-00000.tar.gz")
    for i in (0, 500, 999):
        theirs = torch.from_numpy(pixels_of(files[mini["test"].keys[i] + ".jpg"])).permute(2, 0, 1).int()
        assert (mini["test"].decode(i).int() - theirs).abs().max() <= 2


def plain_reading(path, *, left_out):
    """What read_tar gives of such a tar, by tarfile alone, in a fraction of the time."""
    raw = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        files = {m.name: raw[m.offset_data : m.offset_data + m.size] for m in tar}
    for name, data in files.items():
        if name.endswith(".jpg"):
            yield name.removesuffix(".jpg"), "jpg", data, files[name.replace(".jpg", ".cls")]


@pytest.mark.parametrize("split", COUNTS)
def test_drawing_again_with_the_same_seed_gives_the_same_samples(mini, cifar10_folder, tmp_path, monkeypatch, split):
    if split == "train":
        monkeypatch.setattr(draw, "read_tar", plain_reading)  # the test split is drawn with our own reader
    draw.draw_split(cifar10_folder, tmp_path, split=split, count=COUNTS[split], seed=0)
    again = ShardSet.open(tmp_path)
    assert again.keys == mini[split].keys and again.labels.equal(mini[split].labels)
    every = torch.arange(len(again))
    assert again.encoded(every) == mini[split].encoded(every)
    assert again.manifest.provenance == mini[split].manifest.provenance


def test_files_are_the_sources_unchanged(mini, cifar10_folder):
    ours = dict(zip(mini["test"].keys, mini["test"].encoded(torch.arange(1000)), strict=True))
    labels = dict(zip(mini["test"].keys, mini["test"].labels.tolist(), strict=True))
    found = 0
    for path in sorted(cifar10_folder.glob("*-test-*.tar.gz")):
        files = contents(path)
        for name in files:
            key = f"test-{name.removesuffix('.jpg')}"
            if key in ours:
                found += 1
                assert ours[key] == files[name] and labels[key] == int(files[name.replace(".jpg", ".cls")])
    assert found == 1000


@pytest.fixture
def small_source(tmp_path):
    """30 images of 3 classes in two shards."""
    folder = tmp_path / "src"
    folder.mkdir()
    for shard in range(2):
        keys = range(15 * shard, 15 * shard + 15)
        members = [m for i in keys for m in ((f"{i:03d}.png", picture(i, (32, 32))), (f"{i:03d}.cls", b"%d" % (i % 3)))]
        write_tar(folder / f"x-train-{shard}.tar.gz", members, "w:gz")
    (folder / "manifest.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    return folder


def test_draw_is_balanced_and_another_one_for_another_seed(small_source, tmp_path):
    drawn = {}
    for seed in range(4):
        manifest = draw.draw_split(small_source, tmp_path / str(seed), split="train", count=12, seed=seed)
        shards = ShardSet.open(tmp_path / str(seed))
        assert Counter(shards.labels.tolist()) == {0: 4, 1: 4, 2: 4} and manifest.samples == 12
        assert all(
            int(k.removeprefix("train-")) % 3 == y for k, y in zip(shards.keys, shards.labels.tolist(), strict=True)
        )
        assert manifest.provenance.startswith("12 of the 30 train images")
        assert f"4 of each of 3 classes, drawn with seed {seed}" in manifest.provenance
        drawn[seed] = shards.keys
    assert len(set(drawn.values())) == 4


def test_draw_of_more_than_a_class_has_is_refused(small_source, tmp_path):
    with pytest.raises(DataError, match="has fewer than 11 train images in some class"):
        draw.draw_split(small_source, tmp_path / "out", split="train", count=33, seed=0)


def test_draw_from_the_command_line_writes_each_split_and_says_so(monkeypatch, capsys, tmp_path, small_source):
    monkeypatch.setattr(draw, "COUNTS", {"train": 12})
    monkeypatch.setattr("sys.argv", ["draw", str(small_source), str(tmp_path / "out"), "--seed", "3"])
    draw.main()
    assert "12 images" in capsys.readouterr().out
    draw.draw_split(small_source, tmp_path / "again", split="train", count=12, seed=3)
    assert ShardSet.open(tmp_path / "out" / "train").digest == ShardSet.open(tmp_path / "again").digest

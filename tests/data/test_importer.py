"""Import of class folders and of CIFAR-10: they become data sets, or are refused with nothing written."""

import errno
import hashlib
import io
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from made import array_of, chw, contents, encoded, picture, pixels_of, plant, tree_of
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from poisonshield.data import ShardSet
from poisonshield.data.importer import import_data
from poisonshield.data.summary import Summary
from poisonshield.errors import BusyError, DataError, StorageError
from poisonshield.files import LOCK


def labels_of(folder):
    """{key: class name} of a data set."""
    shards = ShardSet.open(folder)
    return {k: shards.classes[y] for k, y in zip(shards.keys, shards.labels.tolist(), strict=True)}


@pytest.fixture
def src(tmp_path):
    return tmp_path / "src"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# Class-folder trees.


def test_tree_becomes_one_data_set_with_a_class_for_each_folder(src, out):
    plant(src, {"dog/a.png": 0, "cat/b.png": 1, "cat/deep/er/c.png": 2, ".hidden/x.png": 3, "cat/.DS_Store": b""})
    manifests = import_data(src, out)
    assert list(manifests) == [""] and manifests[""].samples == 3 and manifests[""].image_size == (6, 5)
    assert manifests[""].classes == ("cat", "dog") and manifests[""].poison is None
    assert labels_of(out) == {"cat/b": "cat", "cat/deep/er/c": "cat", "dog/a": "dog"}
    shards = ShardSet.open(out)
    for key, seed in (("dog/a", 0), ("cat/b", 1), ("cat/deep/er/c", 2)):
        assert shards.decode(shards.keys.index(key)).equal(chw(array_of(seed)))


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
@pytest.mark.parametrize("train_name", ["train", "training"])
def test_tree_with_splits_becomes_train_and_test(src, out, train_name, test_name):
    plant(src, {f"{train_name}/cat/a.png": 0, f"{train_name}/dog/b.png": 1, f"{test_name}/cat/a.png": 2})
    plant(src, {f"{test_name}/dog/c.png": 3})
    manifests = import_data(src, out)
    assert {split: m.samples for split, m in manifests.items()} == {"train": 2, "test": 2}
    assert labels_of(out / "train") == {f"{train_name}/cat/a": "cat", f"{train_name}/dog/b": "dog"}
    assert labels_of(out / "test") == {f"{test_name}/cat/a": "cat", f"{test_name}/dog/c": "dog"}


def test_files_keep_their_bytes_and_content_decides_over_name(src, out):
    jpeg, png = picture(0, kind="JPEG"), picture(1)
    plant(src, {"a/0.jpg": jpeg, "a/1.JPEG": png, "b/2.bmp": picture(2, kind="BMP")})
    import_data(src, out)
    files = contents(out / "shard-00000.tar")
    assert files["a/0.jpg"] == jpeg and files["a/1.png"] == png
    assert np.array_equal(pixels_of(files["b/2.png"]), array_of(2))


def test_dots_in_names_become_underscores(src, out):
    plant(src, {"v1.0/img.001.png": 0})
    import_data(src, out)
    assert labels_of(out) == {"v1_0/img_001": "v1.0"}


def test_names_that_would_give_the_same_key_are_refused(src, out):
    plant(src, {"a/x.png": 0, "a/x.jpg": picture(kind="JPEG")})
    with pytest.raises(DataError, match="would both be called a/x. Rename one of them"):
        import_data(src, out)
    assert not out.exists()


def test_import_does_not_depend_on_the_order_in_which_files_were_made(tmp_path):
    files = {f"{c}/{i}.png": i for c in "abc" for i in range(4)}
    shuffled = dict(random.Random(0).sample(sorted(files.items()), len(files)))
    for name, made in (("one", files), ("two", shuffled)):
        import_data(plant(tmp_path / name / "src", made), tmp_path / name / "out")
    assert tree_of(tmp_path / "one" / "out") == tree_of(tmp_path / "two" / "out")


def test_class_list_gives_subset_order_and_names(src, out, tmp_path):
    plant(src, {f"{split}/{c}/0.png": i for split in ("train", "val") for i, c in enumerate(["n1", "n2", "n3", "n4"])})
    (tmp_path / "list.txt").write_text("# order of the paper\nn3 crane bird\n\nn1   # no name\nn4 crane bird\n")
    manifests = import_data(src, out, class_list=tmp_path / "list.txt")
    expected = ("crane bird (n3)", "n1", "crane bird (n4)")
    assert manifests["train"].classes == manifests["test"].classes == expected
    assert labels_of(out / "train") == {"train/n3/0": expected[0], "train/n1/0": expected[1], "train/n4/0": expected[2]}
    assert ShardSet.open(out / "test").labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\nbird\n", "lacks 1 of 2 class folders: bird"),
        ("cats\n", "lacks 1 of 1 class folders: cats. Did you mean cat?"),
        ("cat\ndog\ncat\n", ":3: folder cat is listed twice"),
        ("# nothing\n\n", "names no class"),
    ],
)
def test_wrong_class_list_is_refused(src, out, tmp_path, text, words):
    plant(src, {"cat/0.png": 0, "dog/1.png": 1})
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        import_data(src, out, class_list=tmp_path / "list.txt")
    assert words in str(caught.value) and not out.exists()


def test_class_list_that_cannot_be_read_is_refused(src, out, tmp_path):
    plant(src, {"cat/0.png": 0})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for path in (tmp_path / "gone", tmp_path / "binary", tmp_path):
        with pytest.raises(DataError, match="class list .* cannot be read"):
            import_data(src, out, class_list=path)


def test_test_split_may_lack_classes_and_may_not_have_others(src, out):
    """faults D: a validation split that lacks a class (vision#8297)."""
    plant(src, {"train/cat/0.png": 0, "train/dog/1.png": 1, "train/eel/2.png": 2, "val/eel/0.png": 0})
    plant(src, {"val/dog/notes.txt": b""})
    summary = Summary("src")
    manifests = import_data(src, out, summary=summary)
    assert manifests["test"].classes == ("cat", "dog", "eel") and labels_of(out / "test") == {"val/eel/0": "eel"}
    assert summary.classes["test"] == {"cat": 0, "dog": 0, "eel": 1}
    assert summary.left_out["classes of train, without an image in val"] == ["cat", "dog"]
    plant(src, {"val/fox/1.png": 1})
    before = tree_of(out)
    with pytest.raises(DataError, match="val has 1 class folders that the train split lacks: fox"):
        import_data(src, out, overwrite=True)
    assert tree_of(out) == before


def test_empty_class_folder_and_folder_without_classes_are_refused(src, out):
    plant(src, {"readme.txt": b""})
    with pytest.raises(DataError, match="holds neither class folders nor tar shards nor cifar-10-batches-py"):
        import_data(src, out)
    plant(src, {"cat/0.png": 0, "dog/notes.txt": b""})
    with pytest.raises(DataError, match="class folder .*dog has no image"):
        import_data(src, out)


def test_provenance_tells_what_was_done_and_left_out(src, out):
    plant(src, {"cat/0.png": 0, "cat/notes.txt": b"", "cat/more.csv": b""})
    provenance = import_data(src, out)[""].provenance
    assert "class-folder tree src" in provenance and "original files" in provenance
    assert "2 files that are no images were left out" in provenance


def test_size_makes_all_images_one_size_and_without_it_they_may_differ(src, out, tmp_path):
    wide, tall = array_of(0, (20, 30)), array_of(1, (31, 18))
    plant(src, {"a/0.png": encoded(wide), "a/1.png": encoded(tall), "a/2.png": encoded(array_of(2, (16, 16)))})
    assert import_data(src, tmp_path / "as they are")[""].image_size is None
    manifest = import_data(src, out, size=16)[""]
    assert manifest.image_size == (16, 16) and "resized to 16" in manifest.provenance
    shards = ShardSet.open(out)
    assert shards.read(torch.arange(3)).shape == (3, 3, 16, 16)
    assert shards.decode(2).equal(chw(array_of(2, (16, 16))))
    theirs = np.array(Image.fromarray(wide).resize((24, 16), Image.Resampling.BILINEAR))[:, 4:20].astype(int)
    assert np.abs(shards.decode(0).permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_jpeg_quality_decides_how_resized_images_are_stored(src, tmp_path):
    plant(src, {"a/0.png": encoded(array_of(0, (40, 40)))})
    sizes = {}
    for quality in (None, 90, 20):
        place = tmp_path / str(quality)
        manifest = import_data(src, place, size=32, jpeg_quality=quality)[""]
        ((name, data),) = [f for f in contents(place / "shard-00000.tar").items() if not f[0].endswith(".cls")]
        sizes[quality] = len(data)
        assert Image.open(io.BytesIO(data)).format == ("PNG" if quality is None else "JPEG")
        assert name == ("a/0.png" if quality is None else "a/0.jpg")
        assert ("stored as PNG" if quality is None else f"JPEG of quality {quality}") in manifest.provenance
    assert sizes[None] > sizes[90] > sizes[20]


def test_samples_per_shard_is_kept(src, out):
    plant(src, {f"a/{i}.png": i for i in range(5)})
    shards = import_data(src, out, samples_per_shard=2)[""].shards
    assert [info.samples for info in shards.values()] == [2, 2, 1]


BROKEN = {
    "val/cat/cut.png": picture(0, (40, 40))[:600],
    "val/cat/flipped.png": picture(0, (40, 40)).replace(b"IDAT", b"IDAU"),
    "val/dog/text.jpg": b"this is no image",
    "val/dog/empty.png": b"",
    "val/dog/deep.png": encoded(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000),
}


@pytest.fixture
def with_broken(src):
    plant(src, {f"{split}/{c}/{i}.png": i for split in ("train", "val") for c in ("cat", "dog") for i in range(3)})
    return plant(src, BROKEN)


def test_every_broken_image_is_named_and_no_split_is_written(with_broken, out):
    with pytest.raises(DataError, match="^5 images cannot be decoded, so nothing was imported:") as caught:
        import_data(with_broken, out)
    for path in BROKEN:
        assert f"sample {path.rpartition('.')[0]}" in str(caught.value)
    assert "--skip-broken" in str(caught.value) and not out.exists()


def test_broken_images_are_left_out_and_listed_when_asked_to(with_broken, out):
    manifests = import_data(with_broken, out, skip_broken=True)
    assert {s: m.samples for s, m in manifests.items()} == {"train": 6, "test": 6}
    assert sorted(labels_of(out / "test")) == [f"val/{c}/{i}" for c in ("cat", "dog") for i in range(3)]
    listed = "val/cat/cut, val/cat/flipped, val/dog/deep, val/dog/empty, val/dog/text"
    assert f"5 broken images left out: {listed}" in manifests["test"].provenance
    assert "broken" not in manifests["train"].provenance


def test_long_list_of_broken_images_is_cut_at_twenty(src, out):
    plant(src, {f"a/{i:02d}.png": b"" for i in range(23)})
    with pytest.raises(DataError, match=r"(?s)^23 images.*sample a/19.*  \.\.\. and 3 more\n") as caught:
        import_data(src, out)
    assert "sample a/20" not in str(caught.value)
    with pytest.raises(DataError, match="no image came from the class-folder tree src; 23 broken images left out"):
        import_data(src, out, skip_broken=True)
    assert not out.exists()


def test_failed_import_keeps_the_data_sets_that_were_there(src, out):
    plant(src, {f"{split}/cat/0.png": 0 for split in ("train", "test")})
    import_data(src, out)
    before = tree_of(out)
    with pytest.raises(DataError, match="already holds a data set"):
        import_data(src, out)
    plant(src, {"train/cat/0.png": 5, "test/cat/0.png": b"broken"})
    with pytest.raises(DataError, match="1 images cannot be decoded"):
        import_data(src, out, overwrite=True)
    assert tree_of(out) == before
    plant(src, {"test/cat/0.png": 6})
    import_data(src, out, overwrite=True)
    assert ShardSet.open(out / "train").decode(0).equal(chw(array_of(5)))


def test_output_inside_the_source_is_refused(src, tmp_path, monkeypatch):
    plant(src, {"cat/0.png": 0})
    monkeypatch.chdir(src)
    (tmp_path / "alias").symlink_to(src)
    for place in (src, src / "out", src / "cat" / ".." / "out", "out", tmp_path / "alias" / "out"):
        with pytest.raises(DataError, match="lies in the source"):
            import_data(src, place)
    assert sorted(p.name for p in src.rglob("*")) == ["0.png", "cat"]
    assert import_data(src, tmp_path / "src2")[""].samples == 1  # a longer name is not inside


@pytest.mark.parametrize("place", ["pipe:cat x.tar", "https://example.org/x.tar", "s3://bucket"])
def test_commands_and_addresses_are_refused_as_source_and_as_output(src, out, place):
    with pytest.raises(DataError, match="^source .* a local path was wanted"):
        import_data(place, out)
    with pytest.raises(DataError, match="^output folder .* a local path was wanted"):
        import_data(plant(src, {"cat/0.png": 0}), place)


def test_source_that_is_no_folder_is_refused(tmp_path, out):
    (tmp_path / "x.tar").write_bytes(b"")
    for place in (tmp_path / "x.tar", tmp_path / "gone"):
        with pytest.raises(DataError, match="is not a folder"):
            import_data(place, out)


# CIFAR-10 as torchvision knows it.


class Alarm:
    """Unpickling this fails the test."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was opened')",))


def batches(src, data):
    folder = src / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(data(name))
    return folder


def test_cifar10_files_of_a_wrong_md5_are_refused_unopened(src, out):
    folder = batches(src, lambda name: pickle.dumps(Alarm()))
    for place in (src, folder):
        with pytest.raises(DataError, match="is not the official CIFAR-10: .*\n.*no other pickle is opened"):
            import_data(place, out)
    assert not out.exists()


def test_incomplete_cifar10_is_refused(src, out):
    (src / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(DataError, match="is not the official CIFAR-10"):
        import_data(src, out)


@pytest.fixture
def small_cifar10(src, monkeypatch):
    """Files of CIFAR-10's form with 4 images each, whose MD5 sums torchvision is told to expect."""

    def content(name):
        if name == "batches.meta":
            return pickle.dumps({"label_names": [f"class {c}" for c in range(10)]})
        seed = 7 if name == "test_batch" else int(name[-1])
        data = np.stack([array_of(10 * seed + i, (32, 32)).transpose(2, 0, 1).reshape(-1) for i in range(4)])
        return pickle.dumps({"data": data, "labels": [seed, 0, 9, seed]})

    folder = batches(src, content)
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return folder


def test_cifar10_files_become_train_and_test_in_file_order(small_cifar10, out):
    manifests = import_data(small_cifar10, out)
    assert {s: m.samples for s, m in manifests.items()} == {"train": 20, "test": 4}
    train, test = ShardSet.open(out / "train"), ShardSet.open(out / "test")
    assert train.keys == tuple(f"train-{i:05d}" for i in range(20)) and test.keys[3] == "test-00003"
    assert train.labels.tolist() == [y for s in range(1, 6) for y in (s, 0, 9, s)]
    assert test.labels.tolist() == [7, 0, 9, 7]
    assert train.decode(9).equal(chw(array_of(31, (32, 32)))) and test.decode(2).equal(chw(array_of(72, (32, 32))))
    assert train.classes == test.classes == tuple(f"class {c}" for c in range(10)) and train.image_size == (32, 32)
    assert "official CIFAR-10" in manifests["test"].provenance


def test_one_wrong_file_of_cifar10_is_enough_to_refuse_it(small_cifar10, out):
    (small_cifar10 / "test_batch").write_bytes(pickle.dumps(Alarm()))
    with pytest.raises(DataError, match="is not the official CIFAR-10"):
        import_data(small_cifar10, out)
    assert not out.exists()


def test_class_list_for_cifar10_is_refused(small_cifar10, out, tmp_path):
    (tmp_path / "list.txt").write_text("cat\n")
    with pytest.raises(DataError, match="is CIFAR-10, which has its own ten classes"):
        import_data(small_cifar10, out, class_list=tmp_path / "list.txt")


def test_cifar100_files_become_train_and_test(src, out, monkeypatch):
    """faults D: CIFAR-100 pickles."""
    folder = src / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"fine {c}" for c in range(100)]
    for split, seed in (("train", 1), ("test", 2)):
        data = np.stack([array_of(10 * seed + i, (32, 32)).transpose(2, 0, 1).reshape(-1) for i in range(3)])
        (folder / split).write_bytes(pickle.dumps({"data": data, "fine_labels": [99, 0, seed]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    for place, target in ((src, out), (folder, out.with_name("again"))):
        manifests = import_data(place, target)
        test = ShardSet.open(target / "test")
        assert test.labels.tolist() == [99, 0, 2] and list(test.classes) == names
        assert test.decode(1).equal(chw(array_of(21, (32, 32)))) and test.keys[0] == "test-00000"
        assert manifests["train"].samples == 3 and "official CIFAR-100" in manifests["train"].provenance
    (folder / "meta").write_bytes(pickle.dumps(Alarm()))
    with pytest.raises(DataError, match="is not the official CIFAR-100: (?s:.*)no other pickle is opened"):
        import_data(src, out, overwrite=True)


def test_two_kinds_of_cifar_beside_each_other_are_asked_about(src, out):
    for name in ("cifar-10-batches-py", "cifar-100-python"):
        (src / name).mkdir(parents=True)
    with pytest.raises(DataError, match="Give the path of the one that is meant"):
        import_data(src, out)


# Two imports at once, and disks.


def test_second_import_into_one_folder_is_refused_before_it_reads(src, out, monkeypatch):
    """faults B: the first reported success, the second deleted it and died."""
    plant(src, {"a/0.png": 0})
    out.mkdir()
    owner = {"host": "elsewhere", "pid": 7, "since": "now"}
    (out / LOCK).write_text(json.dumps(owner))
    monkeypatch.setattr("poisonshield.data.importer._import", None)
    with pytest.raises(BusyError, match="is in use: process 7 on elsewhere"):
        import_data(src, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == [LOCK]


def test_of_two_imports_at_once_one_wins_whole(src, out):
    """faults B, by real processes."""
    plant(src, {f"a/{i}.png": i for i in range(80)})
    code = f"from poisonshield.data.importer import import_data; import_data({str(src)!r}, {str(out)!r})"
    tries = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in tries]
    assert sum(process.returncode == 0 for process in tries) == 1
    for process, error in zip(tries, errors, strict=True):
        assert process.returncode == 0 or "BusyError" in error or "already holds a data set" in error, error
    assert len(ShardSet.open(out)) == 80
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "shard-00000.tar"]


def test_a_full_disk_is_worded_and_leaves_no_folder(src, out, monkeypatch):
    plant(src, {"a/0.png": 0})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("poisonshield.data.writer._HashedFile.write", full)
    with pytest.raises(StorageError, match="out cannot be written: the disk is full"):
        import_data(src, out)
    assert not out.exists()


def test_an_output_that_is_a_file_is_refused(src, out):
    plant(src, {"a/0.png": 0})
    out.write_text("mine")
    for place in (out, out / "deep" / "set"):
        with pytest.raises(DataError, match="out is not a folder. Choose another name"):
            import_data(src, place)
    assert out.read_text() == "mine"

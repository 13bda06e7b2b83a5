"""The writer: ordinary tars that tarfile and webdataset read, equal bytes for equal samples, all of it or nothing."""

import errno
import hashlib
import json
import os
import resource
import tarfile
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import array_of, chw, contents, encoded, picture, pixels_of, tree_of

from poisonshield.data import Manifest, ShardSet
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import BusyError, ConfigError, DataError, StorageError
from poisonshield.files import LOCK


def write(folder, count=7, *, size=(6, 5), shift=0, **settings_):
    given_ = {"classes": ["a", "b", "c"], "image_size": size, "samples_per_shard": 3, **settings_}
    with ShardWriter(folder, **given_) as writer:
        for i in range(count):
            writer.write(f"set/{i}", chw(array_of(i + shift, size)), i % 3)
    return folder


@pytest.mark.parametrize("compress", [False, True])
def test_written_shards_hold_the_pixels_and_labels_that_went_in(tmp_path, compress):
    write(tmp_path / "out", compress=compress, provenance="by hand", poison={"name": "lsp", "eps": "8/255"})
    names = [f"shard-0000{n}.tar" + ".gz" * compress for n in range(3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", *names]
    files = {}
    for name in names:
        files |= contents(tmp_path / "out" / name)
    assert sorted(files) == sorted(f"set/{i}.{field}" for i in range(7) for field in ("cls", "png"))
    for i in range(7):
        assert np.array_equal(pixels_of(files[f"set/{i}.png"]), array_of(i))
        assert files[f"set/{i}.cls"] == b"%d" % (i % 3)


def test_manifest_states_the_bytes_that_are_on_disk(tmp_path):
    write(tmp_path / "out", provenance="by hand", poison={"name": "lsp"})
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [info["samples"] for info in found["shards"].values()] == [3, 3, 1] and found["samples"] == 7
    for name, info in found["shards"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert info["bytes"] == len(data) and info["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["classes"] == ["a", "b", "c"] and found["image_size"] == [6, 5]
    assert found["provenance"] == "by hand" and found["poison"] == {"name": "lsp"}


def test_written_set_opens_and_close_gives_its_manifest(tmp_path):
    writer = ShardWriter(tmp_path / "out", classes=["a"], image_size=(6, 5))
    writer.write("k", chw(array_of()), 0)
    manifest = writer.close()
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest == manifest == Manifest.load(tmp_path / "out") and shards.keys == ("k",)


def test_shards_are_read_by_webdataset(tmp_path):
    import webdataset

    write(tmp_path / "out")
    pattern = str(tmp_path / "out" / "shard-{00000..00002}.tar")
    found = {s["__key__"]: s for s in webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)}
    assert sorted(found) == [f"set/{i}" for i in range(7)]
    assert np.array_equal(pixels_of(found["set/4"]["png"]), array_of(4)) and found["set/4"]["cls"] == b"1"


@pytest.mark.parametrize("compress", [False, True])
def test_equal_samples_give_equal_bytes_at_another_time_in_another_place(tmp_path, monkeypatch, compress):
    write(tmp_path / "first", compress=compress)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    write(tmp_path / "elsewhere" / "second", compress=compress)
    first, second = tree_of(tmp_path / "first"), tree_of(tmp_path / "elsewhere" / "second")
    assert first == second and len(first) == 4
    write(tmp_path / "third", compress=compress, shift=1)
    assert tree_of(tmp_path / "third") != first


def test_members_tell_nothing_of_who_wrote_them_and_when(tmp_path):
    write(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in tar} == {(0, 0, "", "", 0, 0o644)}


KEYS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=120).filter(str.isprintable),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(KEYS, st.integers(1, 4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_key_that_is_taken_reads_back_as_it_was(tmp_path_factory, keys, per_shard, compress):
    out = tmp_path_factory.mktemp("keys")
    image, taken = chw(array_of()), []
    with ShardWriter(out, classes=["a"], image_size=None, samples_per_shard=per_shard, compress=compress) as writer:
        writer.write("first", image, 0)
        for key in keys:
            try:
                writer.write(key, image, 0)
            except DataError:
                assert key.startswith("/") or len(key.encode()) > 200 or key == "first"
            else:
                taken.append(key)
    assert ShardSet.open(out).keys == ("first", *taken)


@pytest.mark.parametrize("key", ["", "a.b", "./a", "/a", "a\nb", "a\0b", "a\u200bb", "k" * 201, "ä" * 101])
def test_unfit_key_is_refused(tmp_path, key):
    with pytest.raises(DataError, match="is unfit: 1 to 200 printable bytes, no dots, no leading slash"):
        with ShardWriter(tmp_path / "out", classes=["a"], image_size=(6, 5)) as writer:
            writer.write(key, chw(array_of()), 0)


def test_same_key_in_another_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match="^sample k is written twice to .*; keys must be unique"):
        with ShardWriter(tmp_path / "out", classes=["a"], image_size=(6, 5), samples_per_shard=1) as writer:
            writer.write("k", chw(array_of(0)), 0)
            writer.write("k", chw(array_of(1)), 0)


@pytest.mark.parametrize("label", [-1, 2, 10**9])
def test_label_outside_the_classes_is_refused(tmp_path, label):
    with pytest.raises(DataError, match=f"^sample k has label {label}, a number from 0 to 1 was wanted"):
        with ShardWriter(tmp_path / "out", classes=["a", "b"], image_size=(6, 5)) as writer:
            writer.write("k", chw(array_of()), label)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 6, 5), r"torch.float32 \(3, 6, 5\), uint8 \(3, H, W\) was wanted"),
        (torch.zeros(6, 5, 3, dtype=torch.uint8), r"torch.uint8 \(6, 5, 3\), uint8 \(3, H, W\) was wanted"),
        (torch.zeros(1, 3, 6, 5, dtype=torch.uint8), r"torch.uint8 \(1, 3, 6, 5\), uint8 \(3, H, W\) was wanted"),
        (torch.zeros(1, 6, 5, dtype=torch.uint8), r"torch.uint8 \(1, 6, 5\), uint8 \(3, H, W\) was wanted"),
        (torch.zeros(3, 5, 6, dtype=torch.uint8), r"\(5, 6\) pixels, \(6, 5\) was declared"),
    ],
)
def test_other_pixels_than_declared_are_refused(tmp_path, image, words):
    with pytest.raises(DataError, match=f"^sample k is {words}"):
        with ShardWriter(tmp_path / "out", classes=["a"], image_size=(6, 5)) as writer:
            writer.write("k", image, 0)


def test_pixels_in_any_memory_order_are_stored(tmp_path):
    image = chw(array_of(0, (6, 5)))
    assert not image.is_contiguous()
    with ShardWriter(tmp_path / "out", classes=["a"], image_size=None) as writer:
        writer.write("k", image, 0)
        writer.write("turned", image.flip(2).transpose(1, 2), 0)
    files = contents(tmp_path / "out" / "shard-00000.tar")
    assert np.array_equal(pixels_of(files["k.png"]), array_of())
    assert np.array_equal(pixels_of(files["turned.png"]), array_of()[:, ::-1].transpose(1, 0, 2))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "JPG"])
def test_lossy_file_is_refused_in_a_poisoned_set_and_taken_in_a_clean_one(tmp_path, extension):
    data = picture(kind="JPEG")
    with ShardWriter(tmp_path / "clean", classes=["a"], image_size=(6, 5)) as writer:
        writer.write_encoded("k", data, extension, 0)
    assert contents(tmp_path / "clean" / "shard-00000.tar")[f"k.{extension.lower()}"] == data
    for poison in ({"name": "lsp"}, {}):
        with pytest.raises(DataError, match=f"^sample k would be stored as lossy .{extension.lower()} in a poisoned"):
            with ShardWriter(tmp_path / "poisoned", classes=["a"], image_size=(6, 5), poison=poison) as writer:
                writer.write_encoded("k", data, extension, 0)
    assert not (tmp_path / "poisoned").exists()


@pytest.mark.parametrize("extension", ["webp", "pkl", "cls", ""])
def test_file_of_another_kind_is_refused(tmp_path, extension):
    with pytest.raises(DataError, match=f"^sample k is a .{extension} file, one of jpg, jpeg, png was wanted"):
        with ShardWriter(tmp_path / "out", classes=["a"], image_size=(6, 5)) as writer:
            writer.write_encoded("k", b"", extension, 0)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"classes": ["a", "b", "a"]}, DataError, "class name 'a' comes twice"),
        ({"classes": []}, DataError, "there is no class"),
        ({"classes": ["a\x1b[2J"]}, DataError, r"class name 'a\\x1b\[2J' has control characters"),
        ({"samples_per_shard": 0}, ConfigError, "samples_per_shard is 0, at least 1 was wanted"),
        ({"samples_per_shard": -5}, ConfigError, "samples_per_shard is -5, at least 1 was wanted"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, wrong, error, words):
    with pytest.raises(error, match=words):
        ShardWriter(tmp_path / "out", **{"classes": ["a"], "image_size": None, **wrong})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["pipe:cat", "https://example.org/out", "s3://bucket/out"])
def test_commands_and_addresses_are_no_output(folder):
    with pytest.raises(DataError, match="^output folder .* a local path was wanted"):
        ShardWriter(folder, classes=["a"], image_size=None)


@pytest.mark.parametrize("count", [0, 1, 5], ids=["before all", "in the first shard", "in a later shard"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_exception_leaves_the_folder_as_it_was(tmp_path, count, overwrite):
    out = tmp_path / "some" / "out"
    if overwrite:
        write(out, shift=20)
        (out / "note.txt").write_text("mine")
    before = tree_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(out, classes=["a"], image_size=(6, 5), samples_per_shard=2, overwrite=overwrite) as writer:
            for i in range(count):
                writer.write(f"{i}", chw(array_of(i)), 0)
            raise KeyboardInterrupt
    assert tree_of(tmp_path) == before and (tmp_path / "some").exists() == overwrite


def test_set_without_samples_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="^no sample was written to "):
        with ShardWriter(tmp_path / "some" / "out", classes=["a"], image_size=(6, 5)):
            pass
    assert list(tmp_path.iterdir()) == []


def test_statement_that_json_cannot_hold_leaves_the_old_set(tmp_path):
    out = write(tmp_path / "out")
    before = tree_of(out)
    with pytest.raises(Exception, match="serialize"):
        write(out, shift=9, overwrite=True, poison={"delta": object()})
    assert tree_of(out) == before


def test_full_disk_leaves_the_old_set(tmp_path):
    out = write(tmp_path / "out")
    before = tree_of(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # no file may grow beyond it
    try:
        with pytest.raises(
            StorageError, match=r"out cannot be written: the file would be larger than .* MiB are free at"
        ):
            write(out, size=(64, 64), overwrite=True, samples_per_shard=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree_of(out) == before


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_disk_that_is_full_at_any_step_is_worded_and_no_draft_stays(tmp_path, monkeypatch, step):
    """faults B: a full or read-only disk."""
    out = write(tmp_path / "out")
    before = tree_of(out)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"write": "poisonshield.data.writer._HashedFile.write", "fsync": "os.fsync", "rename": "os.replace"}[step]
    monkeypatch.setattr(where, full)
    with pytest.raises(StorageError, match=r"cannot be written: the disk is full .* MiB are free"):
        write(out, overwrite=True)
    monkeypatch.undo()
    if step != "rename":
        assert tree_of(out) == before
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    """faults B: the second is refused before it writes, and the first goes on."""
    out = tmp_path / "out"
    out.mkdir()
    owner = json.dumps({"host": "elsewhere", "pid": 7, "since": "now"})
    (out / LOCK).write_text(owner)
    before = tree_of(tmp_path)
    with pytest.raises(BusyError, match="is in use: process 7 on elsewhere writes this data set"):
        write(out)
    assert tree_of(tmp_path) == before
    (out / LOCK).unlink()
    write(out)
    assert len(ShardSet.open(out)) == 7 and not (out / LOCK).exists()


def test_what_another_writer_finished_in_between_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    late = ShardWriter(out, classes=["a"], image_size=None)
    write(out)
    before = tree_of(out)
    with pytest.raises(DataError, match="already holds a data set"):
        with late:
            pass
    assert tree_of(out) == before


def test_drafts_of_a_writer_that_was_killed_are_removed_by_the_next(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shard-00007.tar.0a1b2c3d.tmp").write_bytes(b"half")
    write(tmp_path / "out")
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_nothing_looks_like_a_data_set_until_all_of_it_is_whole(tmp_path):
    out = tmp_path / "out"
    writer = ShardWriter(out, classes=["a"], image_size=(6, 5), samples_per_shard=1)
    for i in range(3):
        writer.write(f"{i}", chw(array_of(i)), 0)
    assert not [p.name for p in out.iterdir() if not p.name.startswith(".")]
    writer.close()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_data_set_that_is_there_is_not_overwritten_unless_asked_to(tmp_path):
    out = write(tmp_path / "out")
    before = tree_of(out)
    with pytest.raises(DataError, match="already holds a data set; it is not overwritten unless asked to"):
        write(out, shift=9)
    assert tree_of(out) == before


def test_overwriting_replaces_every_shard_and_keeps_other_files(tmp_path):
    out = write(tmp_path / "out", 7)
    (out / "note.txt").write_text("mine")
    write(out, 2, shift=9, overwrite=True, compress=True)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "note.txt", "shard-00000.tar.gz"]
    shards = ShardSet.open(out)
    assert shards.keys == ("set/0", "set/1") and shards.read(torch.tensor([1]))[0].equal(chw(array_of(10)))


def test_damaged_manifest_can_be_overwritten(tmp_path):
    out = write(tmp_path / "out", 2)
    (out / "manifest.json").write_text("{")
    write(out, 3, overwrite=True)
    assert len(ShardSet.open(out)) == 3


def test_image_size_and_provenance_may_be_known_only_at_the_end(tmp_path):
    with ShardWriter(tmp_path / "out", classes=["a"], image_size=None) as writer:
        writer.write_encoded("k", encoded(array_of(0, (9, 7))), "png", 0)
        writer.image_size, writer.provenance = (9, 7), "measured"
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.image_size == (9, 7) and manifest.provenance == "measured"


def test_shards_of_a_writer_that_was_stopped_at_the_last_moment_are_known_as_ours(tmp_path, monkeypatch):
    """Between the old set's end and the new manifest the shards lie there without one."""
    out, replace = write(tmp_path / "out", 2), os.replace

    def power_cut(source, target):
        if str(target).endswith("manifest.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("poisonshield.data.writer.os.replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write(out, 3, overwrite=True)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists() and list(out.glob("shard-*"))
    write(out, 4)
    assert len(ShardSet.open(out)) == 4 and not [p for p in out.iterdir() if p.name.startswith(".")]

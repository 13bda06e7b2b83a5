"""Verification: whatever happened to a shard is noticed and named; `once` looks again when anything changed."""

import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from made import array_of, encoded, write_tar

from poisonshield.data import Manifest, ShardSet, index_cache, verify
from poisonshield.data.check import problems
from poisonshield.data.index import Index
from poisonshield.data.index_cache import index_path
from poisonshield.data.verify import hash_file, index_shard, verified_index, verify_file
from poisonshield.errors import DataError


def described(folder, name, *, samples, classes=3):
    """A manifest that fits one file, whatever is in it."""
    data = (folder / name).read_bytes()
    shard = {"samples": samples, "bytes": max(len(data), 1), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": "poisonshield/1", "classes": [f"c{c}" for c in range(classes)], "image_size": [6, 5]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"samples": samples, "shards": {name: shard}}))
    return Manifest.load(folder)


def flip(path, position):
    """Change one byte, and neither size nor modification time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_sound_data_set_gives_an_index_of_all_shards(hand_made):
    made = hand_made(counts=(5, 4, 1))
    index = verified_index(made.folder, Manifest.load(made.folder))
    assert index.keys == tuple(made.labels) and index.labels.tolist() == list(made.labels.values())
    assert index.shard.tolist() == [0] * 5 + [1] * 4 + [2]


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1])
def test_hash_is_sha256_of_the_file(tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("position", [0, 700, -1], ids=["header", "image", "padding"])
def test_one_changed_byte_is_noticed(hand_made, position):
    made = hand_made()
    flip(made.folder / "s-1.tar", position)
    with pytest.raises(DataError, match=r"(?s)^shard s-1.tar is not the one in the manifest: .*Copy the shard again"):
        ShardSet.open(made.folder)


def test_longer_file_is_noticed(hand_made):
    made = hand_made()
    with open(made.folder / "s-0.tar", "ab") as f:
        f.write(bytes(512))
    with pytest.raises(DataError, match="^shard s-0.tar is not the one in the manifest"):
        ShardSet.open(made.folder)


def test_cut_shard_is_refused_naming_the_sample_where_it_ends(hand_made):
    made = hand_made(counts=(3, 4))
    path = made.folder / "s-1.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = {m.offset_data: m.name for m in tar}
    for length in [0, 1, 300, 511, 512, 600, *range(700, len(whole), 431), len(whole) - 1]:
        path.write_bytes(whole[:length])
        begun = [name for end, name in headers.items() if end <= length]
        at = f" at sample {begun[-1].split('.')[0]}" if begun else ""
        with pytest.raises(DataError) as caught:
            ShardSet.open(made.folder)
        assert str(caught.value).startswith(f"shard s-1.tar ends early{at} ({length:,} of {len(whole):,} bytes)")


def test_cut_inside_a_folder_with_dots_names_the_whole_key(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("v1.0/a.png", encoded(array_of())), ("v1.0/a.cls", b"0")])
    manifest = described(tmp_path, "s.tar", samples=1)
    os.truncate(path, 600)
    with pytest.raises(DataError, match="^shard s.tar ends early at sample v1.0/a [(]600 of "):
        verify_file(tmp_path, manifest, "s.tar")


def test_cut_compressed_shard_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar.gz", [("a.png", encoded(array_of())), ("a.cls", b"0")], "w:gz")
    manifest = described(tmp_path, "s.tar.gz", samples=1)
    whole = (tmp_path / "s.tar.gz").read_bytes()
    assert verified_index(tmp_path, manifest).keys == ("a",)
    for length in [0, 5, 40, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "s.tar.gz").write_bytes(whole[:length])
        with pytest.raises(DataError, match="^shard s.tar.gz ends early"):
            ShardSet.open(tmp_path)


def test_missing_shards_are_named(hand_made):
    made = hand_made(counts=(1,) * 8)
    (made.folder / "s-3.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 8 shards in the manifest are missing: s-3.tar\n  Copy them again"):
        ShardSet.open(made.folder)
    for number in range(3):
        (made.folder / f"s-{number}.tar").unlink()
    (made.folder / "s-7.tar").unlink()
    (made.folder / "s-7.tar").mkdir()
    (made.folder / "s-6.tar").unlink()
    with pytest.raises(DataError, match=r"6 of 8 .* missing: s-0.tar, s-1.tar, s-2.tar, s-3.tar, s-6.tar \.\.\."):
        ShardSet.open(made.folder)


def test_cut_tar_whose_hash_fits_is_still_refused(hand_made):
    made = hand_made(counts=(4,))
    whole = (made.folder / "s-0.tar").read_bytes()
    with tarfile.open(made.folder / "s-0.tar") as tar:
        end = max(m.offset_data + m.size for m in tar)
    for length in [0, 1, 511, 512, 600, *range(700, end, 211), end - 1]:
        (made.folder / "s-0.tar").write_bytes(whole[:length])
        manifest = described(made.folder, "s-0.tar", samples=4)
        with pytest.raises(DataError, match="s-0.tar"):
            index_shard(made.folder, manifest, 0)


@pytest.mark.parametrize("data", [b"", b"\0" * 10240, b"not a tar" * 100, encoded(array_of())])
def test_file_that_is_no_tar_is_refused(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match="^shard s.tar"):
        index_shard(tmp_path, described(tmp_path, "s.tar", samples=1), 0)


@pytest.mark.parametrize(
    "data", [b"", b"not a gzip file", gzip.compress(b"x" * 5000)[:-9]], ids=["empty", "text", "cut short"]
)
def test_file_that_is_no_gzip_is_refused(tmp_path, data):
    (tmp_path / "s.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="^shard s.tar.gz"):
        index_shard(tmp_path, described(tmp_path, "s.tar.gz", samples=1), 0)


def test_compressed_shard_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar.gz", [("a.png", encoded(array_of())), ("a.cls", b"0")], "w:gz")
    manifest = described(tmp_path, "s.tar.gz", samples=1)
    monkeypatch.setattr(verify, "MAX_UNPACKED_BYTES", 10240)  # what the tar has
    assert len(ShardSet.open(tmp_path)) == 1
    monkeypatch.setattr(verify, "MAX_UNPACKED_BYTES", 10239)
    with pytest.raises(DataError, match=r"^shard s.tar.gz unpacks to more than 10,239 bytes"):
        index_shard(tmp_path, manifest, 0)


def test_compressed_shards_are_bounded_all_together(tmp_path, monkeypatch):
    """faults C: 3.7 MB of `.tar.gz` shards took 4.6 GB, each within the bound of one."""
    infos = {}
    for number in range(5):
        path = write_tar(
            tmp_path / f"{number}.tar.gz", [(f"{number}.png", encoded(array_of())), (f"{number}.cls", b"0")], "w:gz"
        )
        infos |= json.loads(described(tmp_path, path.name, samples=1).model_dump_json())["shards"]
    manifest = {"format": "poisonshield/1", "classes": ["a"], "image_size": [6, 5], "samples": 5, "shards": infos}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(verify, "MAX_UNPACKED_BYTES", 5 * 10240)
    shards = ShardSet.open(tmp_path)
    assert shards.read(torch.arange(5)).shape == (5, 3, 6, 5)
    assert pickle.loads(pickle.dumps(shards)).read(torch.arange(5)).shape == (5, 3, 6, 5)
    assert not problems(tmp_path)
    monkeypatch.setattr(verify, "MAX_UNPACKED_BYTES", 5 * 10240 - 1)
    words = r"unpacks to more than 51,199 bytes, counted over all compressed shards"
    with pytest.raises(DataError, match=words):
        ShardSet.open(tmp_path)
    assert any("unpacks to more than 51,199 bytes" in problem for problem in problems(tmp_path))
    late = ShardSet(tmp_path, shards.manifest, shards.index)  # as one whose index was kept
    with pytest.raises(DataError, match=words):
        late.read(torch.arange(5))


def test_names_with_escape_sequences_in_a_tar_reach_no_terminal(tmp_path):
    """faults C: `data verify` printed them."""
    for name in ("\x1b[2J.png", "a.\x1b[2J", "\x1b[2J.pkl", "\x1b[2J.cls"):
        write_tar(tmp_path / "s.tar", [(name, b"7")])
        described(tmp_path, "s.tar", samples=1)
        found = "\n".join(problems(tmp_path))
        assert "\x1b" not in found and "\\x1b[2" in found.lower()
    os.truncate(tmp_path / "s.tar", 600)
    assert "\x1b" not in "".join(problems(tmp_path))


def test_other_count_than_the_manifests_is_refused(hand_made):
    made = hand_made(counts=(5,))
    manifest = described(made.folder, "s-0.tar", samples=6)
    with pytest.raises(DataError, match="^shard s-0.tar holds 5 samples, the manifest says 6"):
        index_shard(made.folder, manifest, 0)


def test_hash_is_compared_before_anything_is_interpreted(hand_made):
    made = hand_made()
    made.replace(0, 1, name="img/0000.pkl")
    ((name, info), *_) = made.manifest["shards"].items()
    made.manifest["shards"][name] = info | {"sha256": "0" * 64}
    made.save()
    with pytest.raises(DataError, match="is not the one in the manifest"):
        ShardSet.open(made.folder)


def test_key_in_two_shards_is_refused(hand_made):
    made = hand_made(counts=(2, 2))
    made.replace(1, 2, name="img/0001.png")
    made.replace(1, 3, name="img/0001.cls")
    with pytest.raises(DataError, match="^sample img/0001 appears twice, the second time in s-1.tar"):
        ShardSet.open(made.folder)


def test_label_outside_the_classes_is_refused_with_key_and_shard(hand_made):
    made = hand_made()
    made.replace(1, 3, data=b"3")
    with pytest.raises(DataError, match="^sample img/0006 in s-1.tar has label '3', a number from 0 to 2 was wanted"):
        ShardSet.open(made.folder)


def test_first_shard_with_a_fault_is_named(hand_made):
    made = hand_made(counts=(2,) * 4)
    for number in (1, 3):
        flip(made.folder / f"s-{number}.tar", 600)
    with pytest.raises(DataError, match="^shard s-1.tar"):
        ShardSet.open(made.folder)


def test_verifying_always_leaves_nothing_in_the_folder(hand_made):
    made = hand_made()
    before = sorted(p.name for p in made.folder.iterdir())
    ShardSet.open(made.folder)
    assert sorted(p.name for p in made.folder.iterdir()) == before


def test_verifying_once_keeps_the_index_and_opens_to_the_same_samples(hand_made):
    made = hand_made()
    fresh = ShardSet.open(made.folder)
    first, second = (ShardSet.open(made.folder, verify="once") for _ in range(2))
    assert index_path(made.folder).is_file()
    assert sorted(p.name for p in made.folder.iterdir()) == ["manifest.json", "s-0.tar", "s-1.tar"]
    for opened in (first, second):
        assert opened.keys == fresh.keys and opened.digest == fresh.digest
        for name in Index.ARRAYS:
            assert np.array_equal(getattr(opened.index, name), getattr(fresh.index, name))


def test_verifying_once_trusts_files_of_the_same_size_and_time(hand_made):
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    flip(made.folder / "s-0.tar", 600)
    assert len(ShardSet.open(made.folder, verify="once")) == 9  # the trade-off that the docstring states
    with pytest.raises(DataError, match="^shard s-0.tar is not the one in the manifest"):
        ShardSet.open(made.folder)


def touch(made):
    flip(made.folder / "s-0.tar", 600)
    os.utime(made.folder / "s-0.tar")


def lengthen(made):
    path = made.folder / "s-0.tar"
    before = path.stat()
    with open(path, "ab") as f:
        f.write(bytes(512))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_hash(made):
    made.manifest["shards"]["s-0.tar"]["sha256"] = "0" * 64
    made.save()


def other_counts(made):
    made.manifest["shards"]["s-0.tar"]["samples"] -= 1
    made.manifest["shards"]["s-1.tar"]["samples"] += 1
    made.save()


def fewer_classes(made):
    made.manifest["classes"].pop()
    made.save()


def one_missing(made):
    (made.folder / "s-1.tar").unlink()


@pytest.mark.parametrize("change", [touch, lengthen, other_hash, other_counts, fewer_classes, one_missing])
def test_verifying_once_looks_again_when_something_changed(hand_made, change):
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    change(made)
    with pytest.raises(DataError):
        ShardSet.open(made.folder, verify="once")


def test_verifying_once_follows_a_data_set_that_was_written_again(hand_made):
    made = hand_made(counts=(5, 4))
    ShardSet.open(made.folder, verify="once")
    again = hand_made(counts=(2, 3), seed=1)
    opened = ShardSet.open(made.folder, verify="once")
    assert opened.keys == tuple(again.labels)
    assert np.array_equal(opened.decode(4).permute(1, 2, 0).numpy(), again.pixels["img/0004"])


def test_damaged_index_is_made_again(hand_made):
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    whole = index_path(made.folder).read_bytes()
    index_path(made.folder).write_bytes(whole[:-30])
    assert ShardSet.open(made.folder, verify="once").keys == tuple(made.labels)
    assert index_cache.recall_index(made.folder, Manifest.load(made.folder)) is not None


def test_an_index_that_came_with_the_data_is_not_looked_at(hand_made, tmp_path, monkeypatch):
    """faults B: a stranger's `.index.npz` in the folder made changed bytes and labels pass as verified."""
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    kept = index_path(made.folder).read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    for name in (".index.npz", index_path(made.folder).name):
        (made.folder / name).write_bytes(kept)
    flip(made.folder / "s-0.tar", 700)
    with pytest.raises(DataError, match="is not the one in the manifest"):
        ShardSet.open(made.folder, verify="once")


CHANGES = {
    "label below 0": ("labels", 0, -7),
    "label beyond the classes": ("labels", 0, 3),
    "shard that is none": ("shard", 8, 2),
    "codec that is none": ("codec", 0, 3),
    "offset beyond the file": ("offset", 0, 10**9),
    "offset before the file": ("offset", 0, -1),
    "length beyond the file": ("length", 0, 10**9),
    "length and offset that wrap around": ("length", 0, 2**63 - 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_index_with_impossible_numbers_is_made_again(hand_made, change):
    """faults B: label -7 was accepted."""
    made = hand_made()
    fresh = ShardSet.open(made.folder, verify="once").index
    name, at, value = CHANGES[change]
    array = getattr(fresh, name).copy()
    array[at] = value
    index_cache.keep_index(made.folder, Manifest.load(made.folder), dataclasses.replace(fresh, **{name: array}))
    assert ShardSet.open(made.folder, verify="once").labels.tolist() == list(made.labels.values())


@pytest.mark.parametrize("change", ["fewer", "more dimensions", "floats", "keys"])
def test_a_kept_index_of_another_form_is_made_again(hand_made, change):
    made = hand_made()
    fresh = ShardSet.open(made.folder, verify="once").index
    odd = {
        "fewer": {"labels": fresh.labels[1:]},
        "more dimensions": {"offset": fresh.offset[:, None]},
        "floats": {"length": fresh.length.astype(float)},
        "keys": {"keys": (fresh.keys[1], *fresh.keys[1:])},
    }[change]
    index_cache.keep_index(made.folder, Manifest.load(made.folder), dataclasses.replace(fresh, **odd))
    assert ShardSet.open(made.folder, verify="once").keys == tuple(made.labels)


def test_an_index_that_another_user_kept_is_made_again(hand_made, monkeypatch):
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    flip(made.folder / "s-0.tar", 600)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    with pytest.raises(DataError, match="is not the one in the manifest"):
        ShardSet.open(made.folder, verify="once")


def test_a_data_set_that_was_moved_is_verified_once_more_and_opens(hand_made, tmp_path):
    """faults B: data moved to another mount."""
    made = hand_made()
    ShardSet.open(made.folder, verify="once")
    moved = tmp_path / "mnt" / "elsewhere"
    moved.parent.mkdir()
    made.folder.rename(moved)
    for _ in range(2):
        assert ShardSet.open(moved, verify="once").keys == tuple(made.labels)
    assert index_path(moved) != index_path(made.folder)


def test_folder_that_cannot_be_written_is_verified_each_time_with_a_warning(hand_made, monkeypatch, caplog):
    made = hand_made()

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Index, "save", read_only)
    assert len(ShardSet.open(made.folder, verify="once")) == 9
    assert "no index can be kept in" in caplog.text
    assert "(Read-only file system), so every open verifies again" in caplog.text
    flip(made.folder / "s-0.tar", 600)
    with pytest.raises(DataError, match="is not the one in the manifest"):
        ShardSet.open(made.folder, verify="once")


def test_verify_file_passes_what_the_manifest_says(hand_made):
    made = hand_made()
    assert verify_file(made.folder, Manifest.load(made.folder), "s-0.tar") is None

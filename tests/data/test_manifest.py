"""The manifest: reads back as written, is written whole or not at all, and says which field is wrong."""

import hashlib
import json
import os
import time

import pytest

from poisonshield.data import Manifest
from poisonshield.data.manifest import ShardInfo, refuse_address
from poisonshield.errors import DataError

GOOD = {
    "format": "poisonshield/1",
    "classes": ["cat", "Käuzchen"],
    "image_size": [6, 5],
    "samples": 9,
    "shards": {
        "s-0.tar": {"samples": 5, "bytes": 10240, "sha256": "a" * 64},
        "s-1.tar.gz": {"samples": 4, "bytes": 700, "sha256": "b" * 64},
    },
    "provenance": "made by hand",
    "poison": {"name": "lsp", "eps": "8/255"},
}


def written(folder, changes, *, without=()):
    found = {k: v for k, v in (GOOD | changes).items() if k not in without}
    (folder / "manifest.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def test_tens_of_thousands_of_classes_are_read_in_no_time(tmp_path):
    folder = written(tmp_path, {"classes": [f"class {c}" for c in range(40_000)]})
    start = time.process_time()
    assert len(Manifest.load(folder).classes) == 40_000
    assert time.process_time() - start < 3  # comparing each name with each other one takes half a minute


def test_every_field_of_a_manifest_is_read(tmp_path):
    manifest = Manifest.load(written(tmp_path, {}))
    assert manifest.classes == ("cat", "Käuzchen") and manifest.image_size == (6, 5) and manifest.samples == 9
    assert list(manifest.shards) == ["s-0.tar", "s-1.tar.gz"]
    assert manifest.shards["s-1.tar.gz"] == ShardInfo(samples=4, bytes=700, sha256="b" * 64)
    assert manifest.provenance == "made by hand" and manifest.poison == {"name": "lsp", "eps": "8/255"}


def test_poison_provenance_and_one_image_size_may_be_absent(tmp_path):
    manifest = Manifest.load(written(tmp_path, {"image_size": None}, without=("poison", "provenance")))
    assert manifest.poison is None and manifest.provenance == "" and manifest.image_size is None


def test_manifest_reads_back_as_it_was_saved(tmp_path):
    manifest = Manifest.model_validate(GOOD)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_interrupted_save_leaves_the_old_manifest(tmp_path, monkeypatch):
    written(tmp_path, {})
    before = (tmp_path / "manifest.json").read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Manifest.model_validate(GOOD | {"provenance": "newer"}).save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_digest_is_a_hash_over_the_shard_hashes_in_order():
    expected = hashlib.sha256(f"{'a' * 64}\n{'b' * 64}".encode()).hexdigest()
    assert Manifest.model_validate(GOOD).digest == expected
    turned = dict(reversed(GOOD["shards"].items()))
    assert Manifest.model_validate(GOOD | {"shards": turned}).digest != expected


def shards(**changes):
    return {"shards": {"s-0.tar": GOOD["shards"]["s-0.tar"] | changes}, "samples": 5}


def named(name):
    return {"shards": {name: GOOD["shards"]["s-0.tar"]}, "samples": 5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "poisonshield/2"}, "format: Input should be 'poisonshield/1'"),
        ({"clases": ["cat"]}, "clases: Extra inputs are not permitted"),
        ({"classes": []}, "classes: "),
        ({"classes": 2}, "classes: "),
        ({"classes": ["cat", "dog", "cat"]}, "class names appear twice: cat"),
        ({"classes": ["cat", "\x1b[31mdog"]}, "class name '\\\\x1b[31mdog' has control characters"),
        (named("s\x1b[2J.tar"), "shard 's\\x1b[2J.tar' has control characters in its name"),
        ({"\x1b[2J": 1}, "\\x1b[2J: Extra inputs are not permitted"),
        ({"image_size": [6]}, "image_size"),
        ({"image_size": [0, 5]}, "image_size.0: Input should be greater than or equal to 1"),
        ({"image_size": "6x5"}, "image_size"),
        ({"samples": 10}, "says 10 samples, its shards add up to 9"),
        ({"samples": "many"}, "samples: Input should be a valid integer"),
        ({"shards": {}}, "shards: "),
        (shards(samples=0), "shards.s-0.tar.samples"),
        (shards(bytes=-1), "shards.s-0.tar.bytes"),
        (shards(sha256="A" * 64), "shards.s-0.tar.sha256"),
        (shards(sha256="a" * 63), "shards.s-0.tar.sha256"),
        (shards(md5="a" * 32), "shards.s-0.tar.md5: Extra inputs"),
        (named("../s-0.tar"), "must be a file name in this folder"),
        (named("/data/s-0.tar"), "must be a file name in this folder"),
        (named("sub\\s-0.tar"), "must be a file name in this folder"),
        (named("s-0.zip"), "ends in .tar or .tar.gz"),
        (named("pipe:cat s-0.tar"), "is a command to run, a local path was wanted"),
        (named("https://example.org/s-0.tar"), "is an address, a local path was wanted"),
        ({"poison": "lsp"}, "poison: "),
        ({"provenance": None}, "provenance: "),
    ],
)
def test_wrong_field_is_named(tmp_path, changes, words):
    with pytest.raises(DataError) as caught:
        Manifest.load(written(tmp_path, changes))
    assert words in str(caught.value) and str(tmp_path / "manifest.json") in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_all_wrong_fields_are_named_at_once(tmp_path):
    with pytest.raises(DataError, match=r"(?s)classes: .*image_size: .*poison: "):
        Manifest.load(written(tmp_path, {"classes": 2, "image_size": 3, "poison": 4}))


@pytest.mark.parametrize("field", ["classes", "image_size", "samples", "shards"])
def test_missing_field_is_named(tmp_path, field):
    with pytest.raises(DataError, match=f"{field}: Field required"):
        Manifest.load(written(tmp_path, {}, without=(field,)))


def test_manifest_of_other_shards_is_sent_to_import(tmp_path):
    with pytest.raises(DataError, match="no 'format' field.*\n  Bring them in with: poisonshield data import"):
        Manifest.load(written(tmp_path, {}, without=("format",)))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"format": }'], ids=["empty", "cut", "binary", "syntax"])
def test_unreadable_json_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match="is not readable JSON"):
        Manifest.load(tmp_path)


def test_escape_sequences_of_provenance_and_poison_are_written_out(tmp_path):
    """faults C: they reached the terminal through `data verify`."""
    changes = {"provenance": "a\x1b[31m\nb", "poison": {"name": "\x1b]0;x\x07", "by": ["\x9b1m"], "eps": 1}}
    manifest = Manifest.load(written(tmp_path, changes))
    assert manifest.provenance == "a\\x1b[31m\\nb"
    assert manifest.poison == {"name": "\\x1b]0;x\\x07", "by": ["\\x9b1m"], "eps": 1}


def test_a_pipe_in_place_of_a_manifest_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="manifest .* is no plain file"):
        Manifest.load(tmp_path)


def test_a_manifest_beyond_all_bounds_is_refused_unread(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="is larger than 67,108,864 bytes"):
        Manifest.load(tmp_path)


def test_json_of_a_hundred_thousand_brackets_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not readable JSON"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"poisonshield/1"'])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="does not describe a data set"):
        Manifest.load(tmp_path)


def test_folder_without_manifest_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(DataError, match="has no manifest.json"):
            Manifest.load(place)


@pytest.mark.parametrize("place", ["pipe:cat x.tar", " PIPE: cat x.tar", "pipe:"])
def test_commands_are_refused(place):
    with pytest.raises(DataError, match="is a command to run, a local path was wanted"):
        refuse_address(place)


@pytest.mark.parametrize(
    "place", ["https://example.org/s.tar", "s3://a/b", "gs://a", "file:///data", "hdfs:x", " ssh://a", "git+ssh.x://a"]
)
def test_every_address_is_refused(place):
    with pytest.raises(DataError, match="is an address, a local path was wanted"):
        refuse_address(place, role="shard")


@pytest.mark.parametrize("place", ["data", "./a:b", "/data/a:b", "../set", "C:\\data", "C:/data", "~/data", "3:4", ""])
def test_local_paths_are_taken(place):
    assert refuse_address(place) is None

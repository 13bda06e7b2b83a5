"""`problems` lists all that is wrong with a data set, each once, and nothing where nothing is wrong."""

import gzip
import hashlib
import json
import os

import pytest
from made import array_of, encoded, link, picture, write_tar

from poisonshield.data import open_dataset
from poisonshield.data.check import problems


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


def place_of(path, data):
    """Where an image file lies in its tar."""
    return path.read_bytes().index(data)


def first_words(found):
    return [problem.splitlines()[0] for problem in found]


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_sound_data_set_has_no_problem(hand_made, kind):
    assert problems(hand_made(kind=kind).folder) == []


def test_sound_data_set_of_differing_sizes_has_no_problem(hand_made):
    made = hand_made()
    made.manifest["image_size"] = None
    made.replace(0, 2, data=picture(0, (9, 9)))
    assert problems(made.folder) == []


def test_bundled_data_set_has_no_problem():
    assert problems(open_dataset("cifar10-mini", "test").folder) == []


def test_folder_without_manifest_is_one_problem(tmp_path):
    assert len(problems(tmp_path)) == 1 and "has no manifest.json" in problems(tmp_path)[0]
    (tmp_path / "manifest.json").write_text("{")
    assert len(problems(tmp_path)) == 1 and "is not readable JSON" in problems(tmp_path)[0]


def test_damaged_image_is_named_besides_its_shard(hand_made):
    """A flipped byte inside a PNG: the process lives, the image is named, the others are not."""
    made = hand_made(size=(20, 20))
    path, image = made.folder / "s-1.tar", made.members[1][4][1]
    flip(path, place_of(path, image) + len(image) // 2)
    first, second = first_words(problems(made.folder))
    assert first.startswith("shard s-1.tar is not the one in the manifest")
    assert second.startswith("sample img/0007 in s-1.tar: ") and "are not a whole PNG image" in second


def test_every_kind_of_problem_is_listed_once(hand_made):
    made = hand_made(counts=(4,) * 7, size=(8, 8))
    made.members[1][3] = ("img/0005.cls", b"9")
    made.members[1][5] = ("img/0006.cls", b"cat")
    made.members[2].append(("img/0008.pkl", b""))
    made.members[2].append(("img/0009.txt", b""))
    made.members[3][0] = ("img/0000.png", made.members[3][0][1])  # the key of a sample in s-0.tar
    made.members[3][1] = ("img/0000.cls", made.members[3][1][1])
    made.members[4][0] = ("img/0016.png", picture(0, (8, 9)))
    made.members[4][2] = ("img/0017.png", b"no image")
    made.members[4][4] = ("img/0018.png", encoded(array_of(0, (8, 8)))[:120])
    del made.members[4][7]
    made.write()
    made.manifest["shards"]["s-4.tar"]["samples"] = 4
    made.manifest["samples"] = 28
    made.save()
    (made.folder / "s-5.tar").unlink()
    os.truncate(made.folder / "s-6.tar", 600)

    found = first_words(problems(made.folder))
    expected = [
        "set: 1 of 7 shards in the manifest are missing: s-5.tar",
        "sample img/0005 in s-1.tar has label '9'",
        "sample img/0006 in s-1.tar has label 'cat'",
        "field .pkl of sample img/0008 in s-2.tar is a pickled or binary object",
        "field .txt of sample img/0009 in s-2.tar is not known",
        "sample img/0019 in s-4.tar has no .cls label (1 such)",
        "shard s-6.tar ends early at sample img/0024 (600 of",
        "shard s-6.tar in ",
        "sample img/0000 appears twice, the second time in s-3.tar",
        "sample img/0016 in s-4.tar is 8x9 pixels, the manifest says 8x8",
        "sample img/0017 in s-4.tar: 8 bytes are not a whole PNG image",
        "sample img/0018 in s-4.tar: 120 bytes are not a whole PNG image",
    ]
    assert len(found) == len(expected), found
    for problem, words in zip(found, expected, strict=True):
        assert words in problem


def test_two_images_links_and_unfit_keys_of_one_shard_are_all_listed(tmp_path):
    members = [("a.png", picture()), ("a.jpg", picture(kind="JPEG")), ("a.cls", b"0")]
    members += [link("b.png"), ("b.cls", b"0"), ("v1.0/c.png", picture()), ("v1.0/c.cls", b"0")]
    data = write_tar(tmp_path / "s.tar", [*members, ("d.png", picture()), ("d.cls", b"0")]).read_bytes()
    shard = {"samples": 4, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": "poisonshield/1", "classes": ["x"], "image_size": [6, 5], "samples": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"shards": {"s.tar": shard}}))
    found = first_words(problems(tmp_path))
    assert len(found) == 3 and "sample a appears twice" in found[0] and "b.png in s.tar is a link" in found[1]
    assert "sample 'v1.0/c' in s.tar: keys have no dots" in found[2]


def test_data_set_without_one_sound_sample_lists_them_all(hand_made):
    made = hand_made(counts=(3,))
    for position in (1, 3, 5):
        made.members[0][position] = (made.members[0][position][0], b"7")
    made.write()
    found = problems(made.folder)
    assert len(found) == 3
    for i, problem in enumerate(found):
        assert problem.startswith(f"sample img/000{i} in s-0.tar has label '7'")


def test_shards_of_which_nothing_can_be_read_are_each_named(hand_made):
    made = hand_made(counts=(2, 2, 2))
    for name, data in (("s-0.tar", b""), ("s-1.tar", b"x" * 5000), ("s-2.tar", bytes(10240))):
        (made.folder / name).write_bytes(data)
    found = "\n".join(problems(made.folder))
    for number in range(3):
        assert f"shard s-{number}.tar" in found


def test_compressed_shard_with_a_wrong_checksum_is_a_problem(hand_made):
    made = hand_made(counts=(2,))
    data = bytearray(gzip.compress((made.folder / "s-0.tar").read_bytes()))
    data[-6] ^= 1
    (made.folder / "s-0.tar.gz").write_bytes(data)
    info = made.manifest["shards"].pop("s-0.tar")
    info |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    made.manifest["shards"]["s-0.tar.gz"] = info
    made.save()
    (found,) = problems(made.folder)
    assert found.startswith("shard s-0.tar.gz is not a whole gzip file")

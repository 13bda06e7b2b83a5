"""A data set by index: the pixels that Pillow put in, in any order, from plain and compressed shards."""

import gzip
import hashlib
import os
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import array_of, chw, encoded, pixels_of
from PIL import Image

from poisonshield.data import ShardSet, open_dataset
from poisonshield.errors import ConfigError, DataError
from poisonshield.random import sample_ids


@pytest.fixture
def made(hand_made):
    return hand_made(counts=(5, 4, 1))


@given(wanted=st.lists(st.integers(0, 9), max_size=25))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_samples_in_any_order_are_the_pixels_that_went_in(made, wanted):
    shards = ShardSet.open(made.folder)
    pixels = shards.read(torch.tensor(wanted, dtype=torch.int64))
    assert pixels.dtype == torch.uint8 and pixels.shape == (len(wanted), 3, 6, 5)
    for row, i in enumerate(wanted):
        assert pixels[row].equal(chw(made.pixels[f"img/{i:04d}"]))


def test_what_a_data_set_says_of_its_samples(made):
    shards = ShardSet.open(made.folder)
    assert len(shards) == 10 and shards.keys == tuple(made.labels)
    assert shards.labels.tolist() == list(made.labels.values()) and shards.labels.dtype == torch.int64
    assert shards.shard.tolist() == [0] * 5 + [1] * 4 + [2]
    assert shards.ids.equal(sample_ids(shards.keys)) and len(set(shards.ids.tolist())) == 10
    assert shards.classes == ("class 0", "class 1", "class 2") and shards.image_size == (6, 5)
    assert shards.where(6) == "sample img/0006 in s-1.tar" and shards.extension(6) == "png"
    assert repr(shards) == f"ShardSet({str(made.folder)!r}, 10 samples, 3 classes)"


def test_image_files_are_handed_out_as_they_are(made):
    files = ShardSet.open(made.folder).encoded(torch.tensor([9, 0, 5, 0]))
    stored = [data for members in made.members for name, data in members if name.endswith(".png")]
    assert files == [stored[9], stored[0], stored[5], stored[0]]


def test_jpeg_is_decoded_as_pillow_decodes_it(hand_made):
    made = hand_made(counts=(3,), kind="jpg", size=(16, 24))
    shards = ShardSet.open(made.folder)
    for i in range(3):
        theirs = chw(pixels_of(made.members[0][2 * i][1])).int()
        assert (shards.decode(i).int() - theirs).abs().max() <= 2  # two builds of libjpeg may round apart


def test_compressed_shards_hold_the_same_samples(hand_made):
    made, packed = hand_made(counts=(5, 4)), hand_made("packed", counts=(5, 4))
    shards = {}
    for name, info in packed.manifest["shards"].items():
        data = gzip.compress((packed.folder / name).read_bytes())
        (packed.folder / name).unlink()
        (packed.folder / f"{name}.gz").write_bytes(data)
        shards[f"{name}.gz"] = info | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    packed.manifest["shards"] = shards
    packed.save()
    plain, unpacked = ShardSet.open(made.folder), ShardSet.open(packed.folder)
    order = torch.tensor([8, 0, 3, 8])
    assert unpacked.keys == plain.keys and unpacked.read(order).equal(plain.read(order))


def test_differing_sizes_can_be_decoded_one_by_one_and_not_be_batched(made):
    made.replace(0, 2, data=encoded(array_of(3, (9, 2))))
    made.manifest["image_size"] = None
    made.save()
    shards = ShardSet.open(made.folder)
    assert shards.decode(1).equal(chw(array_of(3, (9, 2)))) and shards.decode(0).shape == (3, 6, 5)
    with pytest.raises(DataError, match="images of differing sizes, batches need one size"):
        shards.read(torch.tensor([0]))


def test_other_size_than_the_manifests_is_named_by_key_and_shard(made):
    made.replace(1, 4, data=encoded(array_of(3, (5, 6))))
    with pytest.raises(DataError, match=r"^sample img/0007 in s-1.tar is 5x6 pixels, the manifest says 6x5"):
        ShardSet.open(made.folder).read(torch.arange(10))


def test_grey_is_repeated_and_alpha_dropped(made):
    grey, alpha = array_of(1)[:, :, 0], np.dstack([array_of(2), array_of(3)[:, :, 0]])
    made.replace(0, 0, data=encoded(grey))
    made.replace(0, 2, data=encoded(alpha))
    pixels = ShardSet.open(made.folder).read(torch.tensor([0, 1]))
    assert pixels[0].equal(torch.from_numpy(grey).expand(3, 6, 5)) and pixels[1].equal(chw(array_of(2)))


def test_rotation_in_exif_is_ignored(hand_made):
    made = hand_made(counts=(1,), kind="jpg", size=(8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    made.replace(0, 0, data=encoded(array_of(0, (8, 16)), "JPEG", exif=exif))
    assert ShardSet.open(made.folder).decode(0).shape == (3, 8, 16)


BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "cut": encoded(array_of(0, (40, 40)))[:900],
    "jpeg called png": encoded(array_of(), "JPEG"),
    "16 bit": encoded(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_file_that_is_no_8_bit_image_of_its_kind_is_named_by_key_and_shard(made, data):
    made.replace(0, 4, data=data)
    shards = ShardSet.open(made.folder)
    for read in (lambda: shards.read(torch.arange(10)), lambda: shards.decode(2)):
        with pytest.raises(DataError, match=r"^sample img/0002 in s-0.tar"):
            read()
    assert shards.read(torch.tensor([0, 1, 3, 9])).shape == (4, 3, 6, 5)  # its neighbours are well


def test_shard_that_became_shorter_since_it_was_opened_is_named(made):
    shards = ShardSet.open(made.folder)
    os.truncate(made.folder / "s-1.tar", 3000)
    with pytest.raises(DataError, match=r"^sample img/0008 in s-1.tar: the shard became shorter since it was opened"):
        shards.read(torch.tensor([0, 8]))


def test_data_set_that_was_sent_to_another_process_reads_the_same(made):
    shards = ShardSet.open(made.folder)
    again = pickle.loads(pickle.dumps(shards))
    assert again.keys == shards.keys and again.read(torch.arange(10)).equal(shards.read(torch.arange(10)))


def test_unpacked_shards_are_not_sent_to_other_processes():
    shards = open_dataset("cifar10-mini", "test")
    before = len(pickle.dumps(shards))
    shards.read(torch.tensor([0]))
    assert len(pickle.dumps(shards)) == before


def test_reading_leaves_no_file_open(made):
    shards = ShardSet.open(made.folder)
    before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("needs /proc")
    shards.read(torch.arange(10))
    with pytest.raises(DataError):
        os.truncate(made.folder / "s-0.tar", 100)
        shards.read(torch.arange(10))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_data_set_is_opened_by_its_folder_or_by_the_folder_of_its_splits(hand_made):
    train, test = hand_made("both/train", counts=(3,)), hand_made("both/test", counts=(2,))
    both = train.folder.parent
    assert open_dataset(both, "train").folder == train.folder and open_dataset(str(both), "test").folder == test.folder
    assert open_dataset(train.folder, "test").folder == train.folder  # already one split


def test_bundled_name_wins_over_a_folder_unless_it_is_written_as_a_path(hand_made, monkeypatch):
    made = hand_made("cifar10-mini", counts=(3,))
    monkeypatch.chdir(made.folder.parent)
    assert len(open_dataset("cifar10-mini", "test")) == 1000
    assert len(open_dataset("./cifar10-mini", "test")) == 3


def test_data_set_that_is_not_there_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("'cifar10-mni' is not a data set: it is not a folder, and is no")):
        open_dataset("cifar10-mni")
    with pytest.raises(ConfigError, match="Did you mean cifar10-mini[?]"):
        open_dataset("cifar10-mni")
    with pytest.raises(ConfigError, match="it has neither manifest.json nor val/manifest.json"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize("place", ["pipe:cat x", "file:///data/set", "https:data", "git+ssh.x://a/set"])
def test_commands_and_addresses_of_no_store_are_no_data_sets(place):
    for opened in (open_dataset, ShardSet.open):
        with pytest.raises(DataError, match="a local path was wanted"):
            opened(place)

"""A data set behind an address is the one on the disk, whatever its server does, and the cache keeps its bound."""

import multiprocessing
import os
import re
import sys
import time
from itertools import islice

import pytest
import torch
from far_server import far_server

from poisonshield.data import ShardSet, ShardStream, find_folder, open_dataset, remote
from poisonshield.data.cache import cache_folder
from poisonshield.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


@pytest.fixture
def made(hand_made):
    return hand_made(counts=(6,) * 5, size=(16, 12))


@pytest.fixture
def far(made):
    with far_server(made.folder) as (address, server):
        yield address, server


def batches(source, count=12, **settings):
    iterator = iter(ShardStream(source, batch_size=7, seed=1, window=2, **settings))
    taken = [(b.keys, b.x.clone(), b.y.clone()) for b in islice(iterator, count)]
    iterator.close()
    return taken


def are_equal(a, b):
    return all(k == m and x.equal(y) and p.equal(q) for (k, x, p), (m, y, q) in zip(a, b, strict=True))


def size_of(*counts):
    """GiB that hold so many bytes."""
    return sum(counts) / 2**30


def cached():
    return [p for p in cache_folder("shards").rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_afar_are_those_from_disk(made, far, workers):
    near, afar = ShardSet.open(made.folder), ShardSet.open(far[0])
    assert afar.digest == near.digest and afar.keys == near.keys
    assert are_equal(batches(afar, workers=workers), batches(near))
    assert set(far[1].shards_asked.values()) == {1}


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_server_that_fails_cuts_and_dawdles_gives_the_same_batches(made, far, knows_ranges):
    address, server = far
    server.fail_every, server.cut_every, server.pause, server.knows_ranges = 10, 3, 0.005, knows_ranges
    afar = ShardSet.open(address, cache=size_of(*[20000] * 3))
    assert are_equal(batches(afar, 25), batches(ShardSet.open(made.folder), 25))
    assert bool(server.ranges) == knows_ranges  # cut files are taken up where they ended
    assert all(start > 0 for _, start in server.ranges)


def test_cut_file_is_not_fetched_twice(made, far):
    address, server = far
    server.cut_every = 2
    ShardSet.open(address)
    assert all(server.sent[name] == info["bytes"] for name, info in made.manifest["shards"].items())


def test_half_a_file_that_a_killed_process_left_is_taken_up(made, far):
    address, server = far
    ShardSet.open(address)
    for path in cached():
        path.rename(path.with_name(f".{path.name}.part"))
        os.truncate(path.with_name(f".{path.name}.part"), 1000)
    ShardSet.open(address)
    assert len(server.ranges) == 5 and {start for _, start in server.ranges} == {1000}


def test_cache_holds_no_more_than_its_bound(made, far):
    address, server = far
    sizes = [info["bytes"] for info in made.manifest["shards"].values()]
    afar = ShardSet.open(address, cache=size_of(*sizes[:2]))
    for i in torch.arange(30).tolist() + [0, 29, 3]:
        afar.read(torch.tensor([i]))
        assert sum(p.stat().st_size for p in cached()) <= sum(sizes[:2])
    assert max(server.shards_asked.values()) > 1
    assert len(list(cache_folder("shards").glob("*.lock"))) <= 3  # nor litter


def test_what_was_used_least_lately_goes_first(made, far):
    address, server = far
    sizes = [info["bytes"] for info in made.manifest["shards"].values()]
    afar = ShardSet.open(address, cache=size_of(*sizes[:3]))
    for i in (0, 6, 12, 0, 18):  # shards 0, 1, 2, 0, and 3 in place of 1
        afar.read(torch.tensor([i]))
        time.sleep(0.01)
    server.asked.clear()
    afar.read(torch.tensor([0, 12, 18]))
    assert not server.shards_asked


def test_shard_that_the_cache_cannot_hold_is_refused(made, far):
    with pytest.raises(ConfigError, match=r"shard s-\d.tar of http://.* has .* bytes, and data.cache=.* holds 1,000"):
        ShardSet.open(far[0], cache=size_of(1000))


def test_processes_of_a_node_fetch_each_shard_once(made, far):
    address, server = far
    server.pause = 0.02
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ShardSet.open, args=(address,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0] * 3
    assert server.shards_asked == {f"s-{i}.tar": 1 for i in range(5)}


def test_kept_index_spares_every_shard(made, far):
    address, server = far
    first = ShardSet.open(address, verify="once")
    for path in cached():
        path.unlink()
    server.asked.clear()
    assert ShardSet.open(address, verify="once").keys == first.keys and not server.shards_asked


def test_other_bytes_than_the_manifests_are_refused(made, far):
    path = made.folder / "s-3.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard s-3.tar of http://127.* is not the one in the manifest: sha256"):
        ShardSet.open(far[0])
    assert far[1].asked["s-3.tar"] == 2


def test_shard_that_changed_between_two_parts_is_fetched_anew(made, far):
    address, server = far
    ShardSet.open(address)
    for path in cached():
        path.with_name(f".{path.name}.part").write_bytes(bytes(900))
        path.unlink()
    assert len(ShardSet.open(address)) == 30


def test_server_that_stays_away_is_named(made, far, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 3)
    address, server = far
    server.fail_every = 1
    with pytest.raises(DataError, match=r"manifest.json could not be read, 3 times in a row: the server answered 503"):
        ShardSet.open(address)
    assert server.asked["manifest.json"] == 3


def test_shard_that_ends_early_for_good_is_named(made, far, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 3)
    os.truncate(made.folder / "s-2.tar", 2000)
    with pytest.raises(DataError, match=r"s-2.tar could not be read, 3 times in a row"):
        ShardSet.open(far[0])


def test_missing_shard_and_missing_set_are_named_at_once(made, far):
    (made.folder / "s-4.tar").unlink()
    with pytest.raises(DataError, match=r"s-4.tar cannot be read: the server answered 404"):
        ShardSet.open(far[0])
    with pytest.raises(DataError, match=r"http://127.*/other has no manifest.json, so it is no data set"):
        ShardSet.open(far[0] + "/other")
    with pytest.raises(ConfigError, match=r"has neither manifest.json nor val/manifest.json"):
        open_dataset(far[0] + "/other", "val")


def test_split_is_found_behind_an_address(hand_made):
    train = hand_made("both/train", counts=(3,))
    with far_server(train.folder.parent) as (address, _):
        assert find_folder(address, "train") == f"{address}/train"
        assert len(open_dataset(address, "train")) == 3


def test_addresses_are_shown_without_their_secrets():
    shown = remote.show_address("https://me:pw@host.org:8000/set/s-0.tar?X-Signature=abc")
    assert shown == "https://host.org:8000/set/s-0.tar"
    assert remote.join_address("https://h/set/?sig=a", "s 0#.tar") == "https://h/set/s%200%23.tar?sig=a"
    assert remote.join_address("s3://b/set", "s 0.tar") == "s3://b/set/s 0.tar"


def test_other_stores_are_read_by_fsspec(made, monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    store = fsspec.filesystem("s3")
    for path in made.folder.iterdir():
        store.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    afar = ShardSet.open("s3://bucket/set")
    assert are_equal(batches(afar), batches(ShardSet.open(made.folder)))
    store.rm("/bucket/set/manifest.json")
    with pytest.raises(DataError, match="s3://bucket/set has no manifest.json"):
        ShardSet.open("s3://bucket/set")


def test_store_without_its_package_names_it():
    with pytest.raises(DataError, match=re.escape("Install the package for it: pip install gcsfs")):
        ShardSet.open("gs://bucket/set")


@pytest.mark.parametrize(
    "place", ["zip://x.tar::https://h/a", "reference://x", "github://a:b@c", "simplecache::s3://b"]
)
def test_addresses_that_unpack_or_follow_others_are_none(place):
    assert not remote.is_address(place)
    with pytest.raises(DataError, match="is an address, a local path was wanted"):
        open_dataset(place)

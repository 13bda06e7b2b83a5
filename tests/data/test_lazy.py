"""A set that is opened lazily: nothing but its manifest is read, and each shard is checked when it is first read."""

import multiprocessing
import os
import pickle

import pytest
import torch
from far_server import far_server

from poisonshield.data import ShardSet, ShardStream, parts
from poisonshield.errors import DataError


@pytest.fixture
def made(hand_made):
    return hand_made(counts=(6,) * 5)


@pytest.fixture
def checked(monkeypatch):
    """Names of shards whose hash was checked by this process."""
    names, check = [], parts.verify_file
    monkeypatch.setattr(parts, "verify_file", lambda *given: (names.append(given[2]), check(*given)))
    return names


def test_opening_reads_the_manifest_alone(made, checked):
    for path in made.folder.glob("*.tar"):
        path.unlink()
    shards = ShardSet.open(made.folder, verify="lazy")
    assert len(shards) == 30 and shards.is_lazy and not checked
    with pytest.raises(DataError, match="shard s-1.tar is missing in"):
        shards.read(torch.tensor([7]))


def test_shards_are_checked_once_as_they_are_read(made, checked):
    shards, whole = ShardSet.open(made.folder, verify="lazy"), ShardSet.open(made.folder)
    wanted = torch.tensor([13, 2, 14, 2])
    assert shards.read(wanted).equal(whole.read(wanted)) and shards.where(13) == whole.where(13)
    keys, labels = shards.look_up(wanted)
    assert keys == tuple(whole.keys[i] for i in wanted) and labels.equal(whole.labels[wanted])
    assert checked == ["s-0.tar", "s-2.tar"]
    again = ShardSet.open(made.folder, verify="lazy")
    assert again.read(torch.tensor([13])).equal(whole.read(torch.tensor([13])))
    assert len(checked) == 2 and again.is_lazy


def test_damaged_shard_is_named_when_it_is_read_and_not_before(made):
    path = made.folder / "s-3.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    shards = ShardSet.open(made.folder, verify="lazy")
    assert shards.read(torch.arange(18)).shape[0] == 18
    with pytest.raises(DataError, match="shard s-3.tar is not the one in the manifest: sha256"):
        shards.read(torch.tensor([18]))


def test_file_that_changed_since_is_checked_again(made, checked):
    ShardSet.open(made.folder, verify="lazy").read(torch.tensor([0]))
    os.utime(made.folder / "s-0.tar", ns=(1, 1))
    ShardSet.open(made.folder, verify="lazy").read(torch.tensor([0]))
    assert checked == ["s-0.tar"] * 2


def test_kept_part_that_does_not_fit_is_not_trusted(made, checked):
    shards = ShardSet.open(made.folder, verify="lazy")
    whole = shards.read(torch.arange(6))
    (path,) = parts.cache_folder("index").rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-40])
    assert ShardSet.open(made.folder, verify="lazy").read(torch.arange(6)).equal(whole) and len(checked) == 2


def test_order_and_pixels_do_not_depend_on_when_hashes_are_checked(made):
    streams = [ShardStream(ShardSet.open(made.folder, verify=v), batch_size=7, seed=2) for v in ("always", "lazy")]
    for one, other, _ in zip(*streams, range(6), strict=False):
        assert one.keys == other.keys and one.x.equal(other.x) and one.y.equal(other.y)


def test_lazy_set_can_be_sent_to_another_process(made):
    shards = pickle.loads(pickle.dumps(ShardSet.open(made.folder, verify="lazy")))
    assert shards.is_lazy and shards.read(torch.tensor([29])).shape == (1, 3, 6, 5)


def test_set_from_afar_is_fetched_as_far_as_it_is_read(made):
    with far_server(made.folder) as (address, server):
        shards = ShardSet.open(address, verify="lazy")
        assert not server.shards_asked
        assert shards.read(torch.tensor([8, 7])).equal(ShardSet.open(made.folder).read(torch.tensor([8, 7])))
        assert server.shards_asked == {"s-1.tar": 1}


def test_processes_of_a_node_check_a_shard_once(made, tmp_path):
    def read(log):
        check = parts.verify_file
        parts.verify_file = lambda *given: (log.open("a").write(f"{given[2]}\n"), check(*given))
        ShardSet.open(made.folder, verify="lazy").read(torch.arange(30))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read, args=(tmp_path / "log",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0] * 3
    assert sorted((tmp_path / "log").read_text().split()) == [f"s-{i}.tar" for i in range(5)]

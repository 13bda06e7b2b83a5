"""What a plan will read is fetched before, no further than there is room, and never in the way of reading."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from far_server import far_server

from poisonshield.data import ShardSet, ShardStream, ahead, remote
from poisonshield.data.ahead import Fetcher
from poisonshield.errors import DataError


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(ahead, "AT_ONCE", 1)


def walk():
    """Shard s is needed from step s on, 8 steps an epoch, without end."""
    epoch = 0
    while True:
        for step in range(8):
            yield epoch, step, [step // 2, step]
        epoch += 1


def test_no_more_is_fetched_than_there_is_room_for():
    fetched = []
    with Fetcher(fetched.append, walk(), sizes=[10] * 8, room=30).running() as reach:
        assert wait_for(lambda: len(fetched) == 3)
        time.sleep(0.02)
        assert fetched == [0, 1, 2]
        reach(0, 0)
        assert wait_for(lambda: len(fetched) == 4) and fetched == [0, 1, 2, 3]


def test_processes_of_a_node_share_the_room(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    fetched = []
    with Fetcher(fetched.append, walk(), sizes=[10] * 8, room=60).running():
        assert wait_for(lambda: len(fetched) == 2)
        time.sleep(0.02)
        assert fetched == [0, 1]


def test_where_all_has_room_it_rests_an_epoch_ahead():
    fetched = []
    with Fetcher(fetched.append, walk(), sizes=[1] * 8, room=1e9).running():
        assert wait_for(lambda: len(fetched) == 16)
        time.sleep(0.02)
        assert fetched == [*range(8)] * 2


def test_fault_is_left_to_the_reader():
    fetched = []

    def fetch(shard):
        fetched.append(shard)
        if shard == 1:
            raise DataError("away")

    with Fetcher(fetch, walk(), sizes=[10] * 8, room=40).running():
        assert wait_for(lambda: fetched == [0, 1, 2, 3])


def test_threads_end_with_the_walk(hand_made):
    made = hand_made(counts=(4,) * 4)
    with far_server(made.folder) as (address, _):
        iterator = iter(ShardStream(ShardSet.open(address, verify="lazy"), batch_size=4, seed=0, lanes=2))
        next(iterator)
        assert any(t.name.startswith("fetch") for t in threading.enumerate())
        iterator.close()
        assert not any(t.name.startswith("fetch") for t in threading.enumerate())


def test_next_shards_come_while_a_batch_is_trained_on(hand_made):
    made = hand_made(counts=(4,) * 6)
    with far_server(made.folder) as (address, server):
        iterator = iter(ShardStream(ShardSet.open(address, verify="lazy"), batch_size=4, seed=0, lanes=1, window=1))
        next(iterator)
        assert wait_for(lambda: len(server.shards_asked) == 6)
        assert set(server.shards_asked.values()) == {1}
        iterator.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_reader_tells_of_a_shard_that_cannot_be_fetched(hand_made, monkeypatch, workers):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    made = hand_made(counts=(4,) * 6)
    (made.folder / "s-3.tar").unlink()
    with far_server(made.folder) as (address, _):
        stream = ShardStream(ShardSet.open(address, verify="lazy"), batch_size=4, seed=0, lanes=2, workers=workers)
        with pytest.raises(DataError, match="s-3.tar cannot be read: the server answered 404"):
            for _, batch in zip(range(9), stream, strict=False):
                assert batch.x.dtype == torch.float32


def test_a_shard_is_not_held_while_it_is_checked(hand_made, monkeypatch):
    """The reader takes the two locks in the order of a check; in the other order both would wait for each other."""
    made, held = hand_made(counts=(4,) * 2), []
    with far_server(made.folder) as (address, _):
        source = ShardSet.open(address, verify="lazy")
        holding, check = type(source.files).holding, source.parts.check

        @contextmanager
        def seen(folder_of_all, name):
            with holding(folder_of_all, name) as folder:
                held.append(name)
                try:
                    yield folder
                finally:
                    held.remove(name)

        monkeypatch.setattr(type(source.files), "holding", seen)
        monkeypatch.setattr(source.parts, "check", lambda number: check(number) if not held else pytest.fail(str(held)))
        source.fetch(1)
    assert held == []

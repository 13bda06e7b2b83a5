"""Lanes: each sample once, one order for any number of ranks, and a rank that needs its own shards only."""

import json
import subprocess
import sys
import time
from fractions import Fraction
from itertools import islice

import pytest
import torch
from far_server import far_server
from hypothesis import given, settings
from hypothesis import strategies as st

from poisonshield.data import ShardSet, ShardStream
from poisonshield.data.lanes import LanePlan
from poisonshield.errors import CheckpointError, ConfigError


@given(
    counts=st.lists(st.integers(1, 30), min_size=4, max_size=30),
    lanes=st.sampled_from([1, 2, 4]),
    batch_size=st.integers(1, 50),
    window=st.integers(1, 9),
    epoch=st.integers(0, 2),
)
@settings(max_examples=80, deadline=None)
def test_each_sample_comes_once_for_any_number_of_ranks(counts, lanes, batch_size, window, epoch):
    plan = LanePlan(tuple(counts), lanes=lanes, batch_size=batch_size, seed=3, window=window)
    seen = []
    for step in range(plan.steps):
        whole = plan.batch(epoch, step)
        assert len(whole) == plan.sizes[step] <= batch_size
        for world in (w for w in (1, 2, 4) if lanes % w == 0):
            parts = [plan.part(epoch, step, rank=r, world=world) for r in range(world)]
            assert torch.cat(parts).equal(whole)
            assert tuple(map(len, parts)) == plan.rank_sizes(step, world, epoch=epoch)
            assert max(map(len, parts)) <= plan.largest_part(world)
        seen += whole.tolist()
    assert sorted(seen) == list(range(sum(counts)))


@given(counts=st.lists(st.integers(1, 12), min_size=3, max_size=12), batch_size=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_batches_take_from_each_lane_what_a_full_sort_would(counts, batch_size):
    plan = LanePlan(tuple(counts), lanes=3, batch_size=batch_size, seed=0)
    lengths = plan._deal(1).lengths.tolist()
    places = sorted((Fraction(2 * p + 1, 2 * n), lane) for lane, n in enumerate(lengths) for p in range(n))
    before = 0
    for step, size in enumerate(plan.sizes):
        assert plan._taken(1, step).tolist() == [sum(lane == k for _, lane in places[:before]) for k in range(3)]
        before += size


def test_order_depends_on_seed_and_epoch_and_is_repeatable():
    def order(epoch=0, **changes):
        plan = LanePlan((5,) * 10, **{"lanes": 2, "batch_size": 8, "seed": 3, **changes})
        return torch.cat([plan.batch(epoch, step) for step in range(plan.steps)])

    assert order().equal(order()) and not order().equal(order(1)) and not order().equal(order(seed=4))
    assert not order().equal(order(lanes=5)) and not order().equal(torch.arange(50))


def test_order_is_the_one_that_was_released():
    """A golden value: another machine or version that gives another order would break resuming and comparisons."""
    plan = LanePlan((3, 2, 4, 3), lanes=2, batch_size=4, seed=0, window=2)
    assert [plan.batch(0, step).tolist() for step in range(3)] == GOLDEN


GOLDEN = [[3, 4, 1, 0], [6, 8, 2, 11], [7, 5, 10, 9]]


def test_rank_needs_the_shards_of_its_lanes_and_few_at_once():
    plan = LanePlan((20,) * 64, lanes=8, batch_size=64, seed=0, window=16)
    needed = []
    for rank in range(4):
        steps = [plan.part(0, step, rank=rank, world=4) // 20 for step in range(plan.steps)]
        needed.append(set(torch.cat(steps).tolist()))
        assert all(len(s.unique()) <= 2 * 2 * 2 for s in steps)  # two lanes, windows of two, and the next one at a seam
    assert sum(map(len, needed)) == 64 == len(set().union(*needed))


def test_ranks_get_even_parts_of_even_shards():
    plan = LanePlan((50,) * 64, lanes=16, batch_size=128, seed=0)
    plan.check_world(4)
    sizes = [size for step in range(plan.steps) for size in plan.rank_sizes(step, 4)]
    assert max(sizes) - min(sizes) <= 4 and min(sizes) > 0


def test_impossible_lanes_are_refused():
    with pytest.raises(ConfigError, match="data.lanes=5 is more than the data set has shards, 4"):
        LanePlan((3,) * 4, lanes=5, batch_size=4, seed=0)
    with pytest.raises(ConfigError, match="data.lanes=4 cannot be shared out alike by 3 processes"):
        LanePlan((3,) * 4, lanes=4, batch_size=4, seed=0).check_world(3)
    with pytest.raises(ConfigError, match="too few for 4 lanes on 2 processes"):
        LanePlan((3,) * 4, lanes=4, batch_size=4, seed=0).check_world(2)
    with pytest.raises(ConfigError, match="at least 1"):
        LanePlan((3,) * 4, lanes=4, batch_size=0, seed=0)


@pytest.fixture
def made(hand_made):
    return hand_made(counts=(8, 5, 7, 8, 6, 8, 7, 8))


def stream(made, **settings):
    return ShardStream(ShardSet.open(made.folder, verify="lazy"), batch_size=19, seed=5, lanes=4, **settings)


def take(stream, count):
    iterator = iter(stream)
    taken = [(b.keys, b.x.clone(), b.y.clone()) for b in islice(iterator, count)]
    iterator.close()
    return taken


def test_stream_gives_one_order_for_any_ranks_workers_and_verification(made):
    alone = take(stream(made), 7)
    assert sorted(sum((keys for keys, _, _ in alone[:3]), ())) == sorted(made.labels)
    for keys, x, y in alone:
        assert y.tolist() == [made.labels[k] for k in keys]
        assert (
            (x * 255)
            .round()
            .to(torch.uint8)
            .equal(torch.stack([torch.from_numpy(made.pixels[k]).permute(2, 0, 1) for k in keys]))
        )
    other = ShardStream(ShardSet.open(made.folder), batch_size=19, seed=5, lanes=4)
    ranks = [take(stream(made, rank=r, world=2), 7) for r in range(2)]
    both = [(a[0] + b[0], torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])) for a, b in zip(*ranks, strict=True)]
    for found in (take(stream(made, workers=2), 7), take(other, 7), both):
        for one, two in zip(alone, found, strict=True):
            assert one[0] == two[0] and one[1].equal(two[1]) and one[2].equal(two[2])


def test_stream_goes_on_where_it_stopped_with_other_ranks(made):
    wanted = [keys for keys, _, _ in take(stream(made), 9)]
    stopped = stream(made, workers=1)
    take(stopped, 4)
    ranks = [stream(made, rank=r, world=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(stopped.state_dict())
    parts = [[keys for keys, _, _ in take(rank, 5)] for rank in ranks]
    assert [a + b for a, b in zip(*parts, strict=True)] == wanted[4:]


def test_position_of_another_order_is_refused_both_ways(made):
    keys = ShardStream(ShardSet.open(made.folder), batch_size=19, seed=5)
    with pytest.raises(CheckpointError, match="lanes: saved 4, now None"):
        keys.load_state_dict(stream(made).state_dict())
    with pytest.raises(CheckpointError, match="lanes: saved None, now 4"):
        stream(made).load_state_dict(keys.state_dict())


def test_rank_fetches_its_own_shards_only(made):
    with far_server(made.folder) as (address, server):
        shards = ShardSet.open(address, verify="lazy")
        take(ShardStream(shards, batch_size=19, seed=5, lanes=4, rank=0, world=2), 1)
        for _ in range(20):  # the rest of its epoch is on its way
            time.sleep(0.01)
        plan = LanePlan(shards.counts, lanes=4, batch_size=19, seed=5)
        mine = {
            int(s) for e in (0, 1) for t in range(3) for s in shards.parts.shard_of(plan.part(e, t, world=2).numpy())
        }
        assert set(server.shards_asked) <= {f"s-{s}.tar" for s in mine}


PROBE = """
import sys, time, json, resource
from poisonshield.data import ShardSet, ShardStream
from poisonshield.data import decode
decode.load_codecs()
source = ShardSet.open(sys.argv[1], verify="lazy")
next(iter(ShardStream(source, batch_size=8, seed=0, lanes=4, window=4)))
print(json.dumps([len(source), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_first_batch_of_many_shards_reads_no_more_and_holds_no_more(hand_made):
    """The tars of 5,000 shards need not be there: those that the first batch does not need are not looked at."""
    held = {}
    for count in (50, 5000):
        made = hand_made(f"set-{count}", counts=(3,))
        (info,) = made.manifest["shards"].values()
        made.manifest |= {"shards": {f"s-{i}.tar": info for i in range(count)}, "samples": 3 * count}
        made.save()
        plan = LanePlan((3,) * count, lanes=4, batch_size=8, seed=0, window=4)
        needed = {int(i) // 3 for i in plan.batch(0, 0)}
        assert len(needed) <= 8
        data = (made.folder / "s-0.tar").read_bytes()
        for shard in needed:
            (made.folder / f"s-{shard}.tar").write_bytes(data)
        out = subprocess.run([sys.executable, "-c", PROBE, made.folder], capture_output=True, text=True, check=True)
        samples, held[count] = json.loads(out.stdout)
        assert samples == 3 * count
    unit = 2**20 if sys.platform == "darwin" else 2**10
    assert (held[5000] - held[50]) / unit < 25  # MiB: the manifest alone

"""The plan: each sample once, equal steps, and global batches that do not know how many ranks there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poisonshield.data.plan import Plan, near_equal
from poisonshield.errors import ConfigError
from poisonshield.random import sample_ids


def make_plan(shards, batch_size, **changes):
    keys = [f"k{i}" for i in range(sum(shards))]
    shard = torch.cat([torch.full((n,), s) for s, n in enumerate(shards)])
    return Plan(sample_ids(keys), shard, **{"batch_size": batch_size, "seed": 3, **changes})


PLANS = {
    "shards": st.lists(st.integers(1, 20), min_size=1, max_size=12),
    "batch_size": st.integers(1, 40),
    "window": st.integers(1, 6),
    "epoch": st.integers(0, 3),
    "shuffle": st.booleans(),
}


@given(**PLANS, world=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_each_sample_comes_once_and_ranks_take_equal_steps(shards, batch_size, window, epoch, shuffle, world):
    plan = make_plan(shards, batch_size, window=window, shuffle=shuffle)
    if plan.sizes[-1] < world:
        with pytest.raises(ConfigError, match=f"{world} ranks"):
            plan.check_world(world)
        return
    plan.check_world(world)
    seen = []
    for step in range(plan.steps):
        parts = [plan.part(epoch, step, rank=r, world=world) for r in range(world)]
        assert tuple(map(len, parts)) == plan.rank_sizes(step, world)
        assert min(map(len, parts)) >= 1 and max(map(len, parts)) - min(map(len, parts)) <= 1
        assert torch.cat(parts).equal(plan.batch(epoch, step))  # so the global batch is the same for any world
        assert len(plan.batch(epoch, step)) <= batch_size
        seen += torch.cat(parts).tolist()
    assert sorted(seen) == list(range(sum(shards)))
    assert max(plan.sizes) - min(plan.sizes) <= 1
    assert plan.steps == -(-sum(shards) // batch_size)


@given(**PLANS)
@settings(max_examples=50, deadline=None)
def test_reading_stays_inside_a_window_of_shards(shards, batch_size, window, epoch, shuffle):
    plan = make_plan(shards, batch_size, window=window)
    order = plan.shard[plan.order(epoch)].tolist()
    last_use = {s: len(order) - 1 - order[::-1].index(s) for s in order}
    for position in range(len(order)):
        open_now = {s for s in order[: position + 1] if last_use[s] >= position}
        assert len(open_now) <= window, f"shards {open_now} are all in use at sample {position}"


def test_order_depends_on_seed_and_epoch_and_is_repeatable():
    order = make_plan([50], 8).order(0)
    assert order.equal(make_plan([50], 8).order(0))
    assert not order.equal(make_plan([50], 8).order(1))
    assert not order.equal(make_plan([50], 8, seed=4).order(0))
    assert not order.equal(torch.arange(50))


def test_order_is_the_one_that_was_released():
    """A golden value: another machine or version that gives another order would break resuming and comparisons."""
    assert make_plan([12], 4, seed=0).order(0).tolist() == [8, 5, 4, 9, 10, 3, 1, 2, 7, 6, 0, 11]


def test_order_within_one_window_does_not_depend_on_the_sharding():
    assert make_plan([30], 8).order(2).equal(make_plan([7, 3, 20], 8).order(2))


def test_order_is_near_uniform():
    first = torch.stack([make_plan([8], 8, seed=s).order(0) for s in range(2000)])  # [2000, 8]
    counts = torch.stack([first[:, p].bincount(minlength=8) for p in range(8)]).double()
    chi_squared = ((counts - 250) ** 2 / 250).sum(1)  # 7 degrees of freedom: 99.99 % below 29.9
    assert chi_squared.max() < 30


def test_without_shuffle_samples_come_in_index_order():
    assert make_plan([4, 5], 4, shuffle=False).order(7).tolist() == list(range(9))


def test_sizes_are_near_equal_and_larger_first():
    assert near_equal(10, 4) == (3, 3, 2, 2)
    assert make_plan([5000], 128).sizes == (125,) * 40  # not 39 batches of 128 and one of 8


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"window": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError, match="at least 1"):
        make_plan([4], **{"batch_size": 2, **changes})

"""The stream: exactly once, resumable anywhere, the same from tar and from memory, whatever the ranks and workers."""

import subprocess
import sys
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poisonshield.batch import Batch
from poisonshield.data import ResidentSource, ShardSet, ShardStream, evaluate_batches
from poisonshield.data.writer import ShardWriter
from poisonshield.errors import CheckpointError, ConfigError, DataError


def brighten(batch: Batch) -> Batch:
    """A stage that depends on the key, as a poison does."""
    shift = torch.tensor([int(k[-1]) / 255 for k in batch.keys])[:, None, None, None]
    return batch.replace(x=(batch.x + shift).clamp(0, 1).mul(255).round().div(255))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same 23 images in 1, 3 and 23 shards."""
    made = {}
    for per_shard in (23, 8, 1):
        made[per_shard] = tmp_path_factory.mktemp("data") / f"by-{per_shard}"
        generator = torch.Generator().manual_seed(0)
        with ShardWriter(made[per_shard], classes=["a", "b"], image_size=(4, 6), samples_per_shard=per_shard) as writer:
            for i in range(23):
                image = torch.randint(0, 256, (3, 4, 6), generator=generator).to(torch.uint8)
                writer.write(f"k{i:02d}", image, i % 2)
    return made


@pytest.fixture(scope="module")
def sources(folders):
    return {n: ShardSet.open(f) for n, f in folders.items()}


def take(stream, count):
    iterator = iter(stream)
    batches = list(islice(iterator, count))
    iterator.close()
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    def equal(p: Batch, q: Batch) -> bool:
        return (p.keys, p.epoch, p.rank_sizes) == (q.keys, q.epoch, q.rank_sizes) and p.x.equal(q.x) and p.y.equal(q.y)

    return len(a) == len(b) and all(map(equal, a, b))


def whole(parts: list[Batch]) -> tuple:
    """One global batch put together from the parts of all ranks."""
    return sum((p.keys for p in parts), ()), torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])


@given(
    per_shard=st.sampled_from([23, 8, 1]),
    batch_size=st.integers(8, 30),
    world=st.integers(1, 4),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=40, deadline=None)
def test_each_key_comes_once_an_epoch_in_equal_steps(sources, per_shard, batch_size, world, window, seed):
    settings_ = {"batch_size": batch_size, "seed": seed, "window": window}
    alone = ShardStream(sources[per_shard], **settings_)
    ranks = [ShardStream(sources[per_shard], rank=r, world=world, **settings_) for r in range(world)]
    assert {s.steps_per_epoch for s in ranks} == {alone.steps_per_epoch}
    steps = 2 * alone.steps_per_epoch
    seen = []
    for one, *parts in zip(take(alone, steps), *(take(s, steps) for s in ranks), strict=True):
        keys, x, y = whole(parts)
        assert keys == one.keys and x.equal(one.x) and y.equal(one.y)
        assert {p.rank_sizes for p in parts} == ({tuple(map(len, parts))} if world > 1 else {None})
        seen += [(one.epoch, k) for k in keys]
        assert one.draw == one.epoch
    assert sorted(seen) == [(e, f"k{i:02d}") for e in range(2) for i in range(23)]


@pytest.mark.parametrize("workers", [2])
def test_workers_change_nothing(sources, workers):
    plain = ShardStream(sources[8], batch_size=5, seed=1)
    before = torch.get_rng_state()
    assert same(take(plain, 12), take(ShardStream(sources[8], batch_size=5, seed=1, workers=workers), 12))
    assert torch.get_rng_state().equal(before)  # a worker loader that draws its seed globally would change training


@given(stop=st.integers(0, 11), batch_size=st.integers(6, 12), world=st.integers(1, 3), other_world=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_stopping_anywhere_and_resuming_gives_the_same_batches(sources, stop, batch_size, world, other_world):
    def streams(n):
        return [ShardStream(sources[8], batch_size=batch_size, seed=2, rank=r, world=n) for r in range(n)]

    uninterrupted = [take(s, 14) for s in streams(world)]
    stopped = streams(world)
    for s in stopped:
        take(s, stop)
    states = [s.state_dict() for s in stopped]
    assert all(s == states[0] for s in states)
    resumed = streams(world)
    for s, state in zip(resumed, states, strict=True):
        s.load_state_dict(state)
    for s, reference in zip(resumed, uninterrupted, strict=True):
        assert same(take(s, 14 - stop), reference[stop:])

    elsewhere = streams(other_world)  # another number of ranks goes on with the same global batches
    for s in elsewhere:
        s.load_state_dict(states[0])
    for parts, reference in zip(
        zip(*(take(s, 14 - stop) for s in elsewhere), strict=True),
        list(zip(*uninterrupted, strict=True))[stop:],
        strict=True,
    ):
        (keys, x, y), (keys_, x_, y_) = whole(parts), whole(reference)
        assert keys == keys_ and x.equal(x_) and y.equal(y_)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0)])
def test_prefetched_batches_do_not_count_when_resuming(sources, before, after):
    make = {"batch_size": 5, "seed": 2, "stages": (brighten,)}
    reference = take(ShardStream(sources[8], **make), 12)
    stopped = ShardStream(sources[8], workers=before, **make)
    assert same(take(stopped, 7), reference[:7])
    resumed = ShardStream(sources[8], workers=after, **make)
    resumed.load_state_dict(stopped.state_dict())
    assert same(take(resumed, 5), reference[7:])


def test_state_is_plain_and_says_the_next_step(sources):
    stream = ShardStream(sources[8], batch_size=5, seed=2)
    take(stream, stream.steps_per_epoch)
    state = stream.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    assert {type(v) for v in state["plan"].values()} <= {int, str, bool}


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 3}, "seed"), ({"batch_size": 6}, "batch_size"), ({"window": 2}, "window")]
)
def test_state_of_another_plan_is_refused(sources, change, named):
    state = ShardStream(sources[8], batch_size=5, seed=2).state_dict()
    other = ShardStream(sources[8], **{"batch_size": 5, "seed": 2, **change})
    with pytest.raises(CheckpointError, match=f"  {named}: saved"):
        other.load_state_dict(state)


def test_state_of_other_data_is_refused(sources, hand_made):
    state = ShardStream(sources[8], batch_size=5, seed=2).state_dict()
    other = ShardStream(ShardSet.open(hand_made(counts=(23,)).folder), batch_size=5, seed=2)
    with pytest.raises(CheckpointError, match="  data: saved"):
        other.load_state_dict(state)


@pytest.mark.parametrize("stages", [(), (brighten,)], ids=["clean", "staged"])
def test_tar_and_resident_sources_give_the_same_order_and_bytes(sources, stages):
    resident = ResidentSource(sources[8], chunk=5)
    assert same(
        take(ShardStream(resident, batch_size=5, seed=2, stages=stages), 10),
        take(ShardStream(sources[8], batch_size=5, seed=2, stages=stages), 10),
    )


def test_a_recipe_applied_once_equals_the_recipe_applied_while_loading(sources):
    once = ResidentSource(ResidentSource(sources[8]), brighten, chunk=7)
    at_once = ResidentSource(sources[8], brighten, chunk=4)
    assert once.pixels.equal(at_once.pixels)
    assert not once.pixels.equal(ResidentSource(sources[8]).pixels)
    assert same(
        take(ShardStream(once, batch_size=5, seed=2), 10),
        take(ShardStream(sources[8], batch_size=5, seed=2, stages=(brighten,)), 10),
    )


def test_a_stage_that_drops_samples_is_refused_on_resident_pixels(sources):
    with pytest.raises(DataError, match="keeps samples, order and size"):
        ResidentSource(sources[8], lambda b: b.replace(keys=b.keys[1:], x=b.x[1:]))


def test_pixels_are_floats_in_zero_one_and_equal_to_bytes_over_255(sources):
    batch = take(ShardStream(sources[23], batch_size=23, seed=0), 1)[0]
    index = torch.tensor([sources[23].keys.index(k) for k in batch.keys])
    assert batch.x.dtype == torch.float32 and batch.x.min() >= 0 and batch.x.max() <= 1
    assert (batch.x * 255).round().to(torch.uint8).equal(sources[23].read(index))
    assert batch.y.dtype == torch.int64 and batch.y.equal(sources[23].labels[index])


def test_evaluation_sees_each_sample_once_in_index_order(sources):
    batches = list(evaluate_batches(sources[8], batch_size=6))
    assert sum((b.keys for b in batches), ()) == sources[8].keys
    parts = [list(evaluate_batches(sources[8], batch_size=6, rank=r, world=2)) for r in range(2)]
    assert sum((b.keys for pair in zip(*parts, strict=True) for b in pair), ()) == sources[8].keys
    assert parts[0][0].rank_sizes == (3, 3)


def test_more_ranks_than_samples_in_a_batch_is_refused(sources):
    with pytest.raises(ConfigError, match="leave nothing for some of 8 ranks.\n  A global batch size of 16"):
        ShardStream(sources[8], batch_size=6, seed=0, world=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_by_key_and_shard_from_workers_too(hand_made, workers):
    made = hand_made(counts=(5, 4), kind="jpg")
    made.replace(1, 2, data=made.members[1][2][1][:200])
    stream = ShardStream(ShardSet.open(made.folder), batch_size=3, seed=0, workers=workers)
    with pytest.raises(DataError, match=r"^sample img/0006 in s-1.tar: 200 bytes are not a whole JPG image"):
        take(stream, 3)


@pytest.mark.parametrize("attempt", range(3))
def test_a_reader_that_is_killed_is_told_and_the_process_ends(attempt, tmp_path):
    """The other reader ignores the first SIGTERM, and Python used to wait for it at its end for ever.

    torch may raise in the main thread the moment the reader dies, wherever that thread is: then the words are torch's.
    """
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, os, signal, time\n"
        "from poisonshield.data import ShardStream, open_dataset\n"
        "stream = iter(ShardStream(open_dataset('cifar10-mini'), batch_size=50, seed=0, workers=2))\n"
        "next(stream)\n"
        "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "for batch in stream:\n"
        "    time.sleep(0.01)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    told = ("a process that reads data was killed", "is killed by signal: Killed")
    assert any(words in ended.stderr for words in told), ended.stderr

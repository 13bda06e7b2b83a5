"""What an epoch trained on is one number, the same in any order, on any ranks, and over any stop."""

import json
from hashlib import blake2b

import pytest
import torch

from engine.tiny import IMAGES, Interrupted, TinyStream, train
from poisonshield.engine import trainer as trainer_module
from poisonshield.engine.checkpoint import load_plain, save_plain
from poisonshield.engine.tally import Tally

CPU = torch.device("cpu")


def digest(keys):
    """Written out from the definition."""
    total = sum(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys)
    return f"{total % 2**64:016x}"


def told(folder):
    """What metrics.jsonl says of epochs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [epoch for row in rows for epoch in row.get("samples", [])]


EVERY = [f"image-{i}" for i in range(IMAGES)]


def first_batches(epoch, count):
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [f"image-{i}" for i in order[: 8 * count]]


WHOLE = [
    {"epoch": 0, "count": IMAGES, "digest": digest(EVERY)},
    {"epoch": 1, "count": IMAGES, "digest": digest(EVERY)},
    {"epoch": 2, "count": 24, "digest": digest(first_batches(2, 3)), "part": True},
]


@pytest.mark.parametrize("settings", [{}, {"log_every_steps": 4}, {"log_every_steps": 7}], ids=str)
def test_epochs_are_told_by_the_sum_of_their_keys_hashes(tmp_path, settings):
    train(tmp_path, **settings)
    assert told(tmp_path) == WHOLE


def test_epochs_end_inside_a_step_of_several_batches(tmp_path):
    train(tmp_path, accumulate=4, max_steps=3)
    assert told(tmp_path) == WHOLE[:2]


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 5, 6, 8, 13])
def test_run_that_died_and_went_on_tells_what_an_undisturbed_one_tells(tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stream=Interrupted(at, crash), checkpoint_every_steps=2, log_every_steps=3)
    train(tmp_path, checkpoint_every_steps=2, log_every_steps=3, resume="auto")
    assert told(tmp_path) == WHOLE


def test_longer_run_goes_on_counting(tmp_path):
    train(tmp_path, max_steps=4)
    train(tmp_path, max_steps=15, resume="auto")
    assert told(tmp_path)[1:] == WHOLE and told(tmp_path)[0]["part"]


def test_sample_that_is_lost_or_comes_twice_changes_the_number(tmp_path):
    class Lossy(TinyStream):
        def __iter__(self):
            for batch in super().__iter__():
                first = batch.keys[0]
                yield batch.replace(keys=(first, first, *batch.keys[2:])) if self.step == 3 else batch

    train(tmp_path, stream=Lossy(), max_steps=6)
    (row,) = told(tmp_path)
    assert row["count"] == IMAGES and row["digest"] != digest(EVERY)


def test_step_that_was_dropped_did_not_train_on_its_samples(tmp_path):
    train(tmp_path, stream=TinyStream(bad_steps=(2,)), nonfinite="skip", max_steps=6)
    kept = [key for n, key in enumerate(first_batches(0, 6)) if n // 8 != 2]
    assert told(tmp_path) == [{"epoch": 0, "count": 40, "digest": digest(kept)}]


def test_epoch_whose_beginning_an_earlier_version_did_not_count_is_left_out(tmp_path):
    tally = Tally(2, CPU)
    tally.load_state_dict(None)
    for epoch, key in [(4, "a"), (5, "b"), (5, "c")]:
        tally.add(epoch, [key], trained=True)
    assert tally.take(last=True) == [{"epoch": 5, "count": 2, "digest": digest(["b", "c"])}]


def test_state_is_plain_and_keeps_every_bit(tmp_path):
    """Sums go up to 2^64, which no tensor of int64 holds as it stands."""
    keys = next([f"k{i}"] for i in range(99) if digest([f"k{i}"])[0] in "89abcdef")
    tally = Tally(2, CPU)
    tally.add(0, keys, trained=True)
    save_plain(tally.state_dict(), tmp_path / "a.pt")
    again = Tally(2, CPU)
    again.load_state_dict(load_plain(tmp_path / "a.pt"))
    again.add(0, ["z"], trained=True)
    assert again.take(last=False) == [{"epoch": 0, "count": 2, "digest": digest([*keys, "z"])}]


def two_ranks(rank, world, folder):
    train(folder / "two", max_steps=10, log_every_steps=4)
    train(folder / "uneven", max_steps=15, stream=TinyStream(even=False))


@pytest.mark.dist
def test_ranks_add_up_and_one_rank_goes_on_from_two(ask_two_ranks):
    folder = ask_two_ranks(__name__).folder
    assert told(folder / "uneven") == WHOLE
    train(folder / "two", max_steps=15, log_every_steps=4, resume="auto")
    assert [row for row in told(folder / "two") if row["epoch"] != 1 or "part" not in row] == WHOLE


class Clock:
    """Minutes that pass when they are asked for."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 60.0
        return self.now


def test_checkpoints_come_by_the_clock_beside_those_by_steps(tmp_path, monkeypatch):
    """faults B: by default nothing was saved before the end."""
    monkeypatch.setattr(trainer_module, "time", Clock())
    train(tmp_path / "minutes", checkpoint_minutes=3.5, keep_checkpoints=99, max_steps=12)
    assert sorted(p.name for p in (tmp_path / "minutes" / "checkpoints").iterdir()) == [
        f"step-{n:08d}" for n in (4, 8, 12)
    ]
    train(tmp_path / "steps", checkpoint_minutes=None, keep_checkpoints=99, max_steps=12)
    assert [p.name for p in (tmp_path / "steps" / "checkpoints").iterdir()] == ["step-00000012"]

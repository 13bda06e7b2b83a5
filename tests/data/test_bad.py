"""Images that cannot be read: they stop a run, or are left out by name, up to a number of them."""

from itertools import islice

import pytest
import torch

from poisonshield.data import ResidentSource, ShardSet, ShardStream, evaluate_batches
from poisonshield.data.bad import parse_limit
from poisonshield.errors import ConfigError, DataError

BAD = {"img/0002", "img/0007"}


@pytest.fixture
def made(hand_made):
    made = hand_made(counts=(5, 5, 5))
    made.replace(0, 4, data=b"not an image")
    made.replace(1, 4, data=b"\x89PNG\r\n\x1a\n cut")
    return made


def take(source, count, **settings):
    iterator = iter(ShardStream(source, batch_size=5, seed=1, **settings))
    taken = [(b.keys, b.x.clone(), b.y.clone()) for b in islice(iterator, count)]
    iterator.close()
    return taken


def test_bad_sample_stops_by_default(made):
    with pytest.raises(DataError, match=r"^sample img/000[27] in s-[01].tar"):
        take(ShardSet.open(made.folder), 3)


@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"lanes": 3}], ids=str)
def test_others_take_the_place_of_bad_samples(made, settings, caplog):
    batches = take(ShardSet.open(made.folder, verify="lazy", bad_limit=2), 6, **settings)
    for keys, x, y in batches:
        assert len(keys) == 5 and not BAD & set(keys)
        assert y.tolist() == [made.labels[k] for k in keys]
        pixels = torch.stack([torch.from_numpy(made.pixels[k]).permute(2, 0, 1) for k in keys])
        assert (x * 255).round().to(torch.uint8).equal(pixels)
    for epoch in (batches[:3], batches[3:]):
        assert set(sum((keys for keys, _, _ in epoch), ())) == set(made.labels) - BAD
    named = [r.getMessage() for r in caplog.records if r.getMessage().startswith("bad sample")]
    assert len(named) == 2 and all(any(key in line for line in named) for key in BAD)  # once each, over two epochs


def test_all_but_bad_samples_are_where_they_would_be(made, hand_made):
    sound = take(ShardSet.open(hand_made("sound", counts=(5, 5, 5)).folder), 3)
    for (keys, _, _), (wanted, _, _) in zip(take(ShardSet.open(made.folder, bad_limit=5), 3), sound, strict=True):
        assert all(k == w for k, w in zip(keys, wanted, strict=True) if w not in BAD)


def test_samples_in_memory_leave_out_the_same(made):
    source = ShardSet.open(made.folder, bad_limit=2)
    for one, other in zip(take(source, 6), take(ResidentSource(source, chunk=4), 6), strict=True):
        assert one[0] == other[0] and one[1].equal(other[1]) and one[2].equal(other[2])
    keys = [b.keys for b in evaluate_batches(ResidentSource(source), batch_size=5)]
    assert keys == [b.keys for b in evaluate_batches(source, batch_size=5)]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_the_limit_stop(made, workers):
    with pytest.raises(DataError, match=r"2 samples are bad, and data.bad_samples=skip:1 leaves out fewer"):
        take(ShardSet.open(made.folder, bad_limit=1), 3, workers=workers)
    with pytest.raises(DataError, match=r"2 samples are bad"):
        ResidentSource(ShardSet.open(made.folder, bad_limit=1))


def test_part_of_a_batch_without_one_good_sample_stops(made):
    stream = ShardStream(ShardSet.open(made.folder, bad_limit=9), batch_size=1, seed=1)
    with pytest.raises(DataError, match="all 1 samples of a part of a batch are bad. The first: sample img/000"):
        for _ in zip(range(15), stream, strict=False):
            pass


def test_missing_shard_is_no_bad_sample(made):
    source = ShardSet.open(made.folder, verify="lazy", bad_limit=99)
    (made.folder / "s-2.tar").unlink()
    with pytest.raises(DataError, match=r"shard s-2.tar is missing"):
        take(source, 3)


def test_setting_is_stop_or_skip_with_a_number():
    assert parse_limit("stop") == 0 and parse_limit("skip:12") == 12
    for text in ("skip", "skip:0", "skip:-1", "all"):
        with pytest.raises(ConfigError, match="'stop' or 'skip:N' was wanted"):
            parse_limit(text)

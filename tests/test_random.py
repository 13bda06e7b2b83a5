"""Philox: published known answers, independence of batch and order, uniformity."""

import math

import torch

from poisonshield.random import KeyedRandom, philox4x32, philox_normal, philox_uniform, philox_words, sample_ids


def words(counter, key):
    out = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    return [int(w) for w in out]


def test_known_answers_of_the_authors():
    """From Random123's known-answer file for philox4x32, 10 rounds."""
    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(counter, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_matches_plain_python_integers():
    ids = torch.tensor([3, -7, 2**40 + 5])
    out = philox_words(9, seed=2**33 + 11, ids=ids, offset=4, stream=2**31 + 1)
    for row, sample in zip(out.tolist(), ids.tolist(), strict=True):
        for element, word in enumerate(row):
            low, high = sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF
            c, k = [element // 4, low, 4, 2**31 + 1], [11 ^ high, 2]
            for _ in range(10):
                p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
                k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
            assert word == c[element % 4]


def test_rows_do_not_depend_on_the_batch_or_on_how_many_are_drawn():
    ids = sample_ids([f"k{i}" for i in range(10)])
    whole = philox_uniform((len(ids), 13), 1, sample_ids=ids)
    assert torch.equal(philox_uniform((len(ids[[7, 2]]), 13), 1, sample_ids=ids[[7, 2]]), whole[[7, 2]])
    assert torch.equal(philox_uniform((len(ids), 5), 1, sample_ids=ids), whole[:, :5])


def test_seed_offset_stream_and_sample_give_other_numbers():
    ids = torch.arange(4)
    base = philox_uniform((len(ids), 64), 1, sample_ids=ids)
    others = [
        philox_uniform((len(ids), 64), 2, sample_ids=ids),
        philox_uniform((len(ids), 64), 1, sample_ids=ids, offset=1),
        philox_uniform((len(ids), 64), 1, sample_ids=ids, stream=1),
        base.roll(1, 0),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(256)


def test_uniform_and_normal_have_their_moments():
    ids = torch.arange(400)
    u, n = philox_uniform((len(ids), 500), 0, sample_ids=ids), philox_normal(501, seed=0, ids=ids)
    assert u.min() >= 0 and u.max() < 1
    edges = torch.histc(u, 20, 0, 1) / u.numel()
    assert (edges - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / u.numel())
    assert abs(n.mean()) < 5 / math.sqrt(n.numel()) and abs(n.std() - 1) < 5 / math.sqrt(2 * n.numel())
    assert torch.isfinite(n).all() and (n**4).mean().item() - 3 < 0.1


def test_purposes_and_scopes_are_streams_of_their_own():
    rng = KeyedRandom(0, torch.arange(3))
    assert torch.equal(rng.uniform("a", 8), rng.uniform("a", 8))
    assert not torch.equal(rng.uniform("a", 8), rng.uniform("b", 8))
    assert not torch.equal(rng.uniform("a", 8), rng.within("view0").uniform("a", 8))


def test_sample_ids_are_stable_and_distinct():
    assert sample_ids(["train-000001"]).tolist() == sample_ids(["train-000001"]).tolist()
    assert len(set(sample_ids([str(i) for i in range(5000)]).tolist())) == 5000

"""The record that travels: what its random numbers depend on."""

import torch

from poisonshield.batch import Batch


def numbers(batch):
    return batch.random(3).uniform("noise", 5)


def test_random_numbers_follow_key_and_draw_and_nothing_else():
    whole = Batch(("a", "b", "c"), draw=2)
    assert torch.equal(numbers(Batch(("c", "a"), draw=2)), numbers(whole)[[2, 0]])
    assert torch.equal(numbers(whole.replace(epoch=7)), numbers(whole))
    assert not (numbers(whole.replace(draw=3)) == numbers(whole)).any()
    assert len(numbers(whole).unique()) == 15

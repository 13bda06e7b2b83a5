"""The record that travels: what its random numbers depend on, and what it says where a field is missing."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.errors import DataError


def numbers(batch):
    return batch.random(3).uniform("noise", 5)


def test_random_numbers_follow_key_and_draw_and_nothing_else():
    whole = Batch(("a", "b", "c"), draw=2)
    assert torch.equal(numbers(Batch(("c", "a"), draw=2)), numbers(whole)[[2, 0]])
    assert torch.equal(numbers(whole.replace(epoch=7)), numbers(whole))
    assert not (numbers(whole.replace(draw=3)) == numbers(whole)).any()
    assert len(numbers(whole).unique()) == 15


FIELDS = {
    "pixels": ("x", torch.zeros(2, 3, 4, 4)),
    "labels": ("y", torch.zeros(2, dtype=torch.int64)),
    "masks": ("mask", torch.zeros(2, 1, 4, 4)),
    "all_views": ("views", (torch.zeros(2, 3, 4, 4),)),
    "all_captions": ("captions", ("one", "two")),
}


@pytest.mark.parametrize("accessor", FIELDS)
def test_a_field_that_is_needed_is_given_or_refused_by_name(accessor):
    field, value = FIELDS[accessor]
    assert getattr(Batch(("a", "b"), **{field: value}), accessor)() is value
    with pytest.raises(DataError, match=f"of a and 1 more comes without {field}"):
        getattr(Batch(("a", "b")), accessor)()

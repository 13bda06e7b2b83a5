"""The report on a learned word: neighbours, size, and the way from the clean word."""

import json

import pytest
import torch
from tiny import tiny_model

from poisonshield.errors import ShapeError
from poisonshield.evals.diffusion.word import vocabulary, word_distance, word_report


def test_a_word_is_its_own_nearest_neighbour_and_the_others_come_by_cosine():
    model = tiny_model()
    ring, other = model.word_vector("ring"), torch.randn(16, generator=torch.Generator().manual_seed(0))
    told = word_report(torch.stack([3 * ring, other]), model, nearest=3)
    assert told["nearest"][0][0] == ["ring", pytest.approx(1.0)]
    words, table = vocabulary(model)
    cosines = [float(row @ other.double() / (row.norm() * other.double().norm())) for row in table]
    order = sorted(range(len(words)), key=lambda i: -cosines[i])[:3]
    assert told["nearest"][1] == [[words[i], pytest.approx(cosines[i])] for i in order]
    assert told["norm"][0] == pytest.approx(float(3 * ring.norm()), rel=1e-5)
    json.dumps(told)


def test_the_distance_to_the_clean_word_takes_all_vectors_together():
    v, clean = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    told = word_distance(v, clean)
    a, b = v.flatten().double(), clean.flatten().double()
    assert told["cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    assert told["l2"] == pytest.approx(float(((a - b) ** 2).sum().sqrt()))


def test_placeholders_and_special_tokens_are_no_neighbours():
    model = tiny_model()
    model.add_placeholder("<sks>")
    words, table = vocabulary(model)
    assert len(words) == len(table) == model.vocabulary - len(set(model.tokenizer.all_special_ids))
    assert "<sks>" not in words and "<|endoftext|>" not in words and "circle" in words


def test_the_percentile_counts_shorter_rows():
    model = tiny_model()
    _, table = vocabulary(model)
    middle = table[table.norm(dim=1).argsort()[len(table) // 2]]
    told = word_report(torch.stack([middle, 100 * middle, 0 * middle]).float(), model)
    assert told["norm_percentile"] == [pytest.approx(50, abs=1), 100, 0]


def test_other_widths_are_refused():
    model = tiny_model()
    with pytest.raises(ShapeError, match=r"\[k, 16\]"):
        word_report(torch.rand(1, 8), model)
    with pytest.raises(ShapeError, match="equal shapes"):
        word_distance(torch.rand(1, 16), torch.rand(2, 16))

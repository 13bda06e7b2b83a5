"""Every method that learns words, found by scanning: newcomers are tested without a line here."""

import copy

import pytest
import torch
from tiny import tiny_model

from poisonshield.batch import Batch
from poisonshield.method import DiffusionMethod
from poisonshield.runs.invert import Invert

METHODS = Invert.methods
TOKENS = {"ring": "<ringx>", "star": "<starx>"}
EACH = 2  # samples of a concept


def make(name, seed=0):
    cls = METHODS.get(name)
    torch.manual_seed(0)
    return cls(cls.Config(), model=tiny_model(), tokens=TOKENS, seed=seed, samples=EACH)


def photos(draw=0):
    """Two samples of each concept, as a concept stream gives them."""
    keys = tuple(f"{name}/{slot}#{slot}" for name in TOKENS for slot in range(EACH))
    x = torch.rand(len(keys), 3, 16, 16, generator=torch.Generator().manual_seed(5))
    y = torch.arange(len(TOKENS)).repeat_interleave(EACH)
    captions = tuple(f"a photo of a {token}" for token in TOKENS.values() for _ in range(EACH))
    return Batch(keys, x, y=y, captions=captions, draw=draw)


def train(method, steps, draw=lambda step: step):
    """The loss of each step under Adam."""
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    losses = []
    for step in range(steps):
        out = method(photos(draw(step)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step((step + 1) / steps)
        losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize("name", METHODS.names())
def test_class_is_named_as_its_file_with_settings_that_are_described(name):
    cls = METHODS.get(name)
    assert issubclass(cls, DiffusionMethod) and cls.name == name and cls.trains_words and cls.__doc__
    assert all(field.description for field in cls.Config.model_fields.values())
    assert cls.start_word(cls.Config()) is None or isinstance(cls.start_word(cls.Config()), str)


@pytest.mark.parametrize("name", METHODS.names())
def test_vectors_are_all_that_is_learned_and_each_concept_has_its_rows(name):
    method = make(name)
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    start = method.vectors.detach().clone()
    assert [key for key, _ in method.named_parameters()] == ["vectors"]
    assert list(method.placeholders) == list(TOKENS)
    assert torch.equal(torch.cat([method.rows(concept) for concept in TOKENS]), method.vectors)
    train(method, 3)
    assert all(torch.equal(value, before[key]) for key, value in method.model.state_dict().items())
    assert (method.vectors != start).any(1).all()


@pytest.mark.parametrize("name", METHODS.names())
def test_loss_falls_on_one_draw(name):
    losses = train(make(name), 30, draw=lambda step: 0)
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", METHODS.names())
def test_state_dict_is_the_whole_state(name):
    method, other = make(name), make(name, seed=0)
    train(method, 2)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert train(method, 2) == train(other, 2)


@pytest.mark.parametrize("name", METHODS.names())
def test_a_step_follows_seed_draw_and_keys_and_neither_order_nor_global_random_numbers(name):
    method, batch, state = make(name), photos(), torch.get_rng_state()
    first = method(batch)
    order = [2, 0, 3, 1]
    mixed = batch.replace(
        keys=tuple(batch.keys[i] for i in order),
        x=batch.x[order],
        y=batch.y[order],
        captions=tuple(batch.captions[i] for i in order),
    )
    assert torch.equal(method(batch).loss, first.loss) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(method(mixed).loss, first.loss, atol=1e-5, rtol=1e-5)
    assert method(photos(draw=1)).loss != first.loss
    assert first.loss.shape == () and first.loss.requires_grad
    assert all(value.shape == () and not value.requires_grad for value in first.metrics.values())

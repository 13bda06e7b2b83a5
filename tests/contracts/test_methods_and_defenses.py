"""Every method and every defense that the folders hold, found by name: newcomers are tested without a line here."""

import copy
import dataclasses
import inspect

import pytest
import torch
from tiny import tiny_batch, tiny_encoder

from poisonshield.defenses.base import Context, Defense
from poisonshield.errors import ConfigError
from poisonshield.runs.classify import Classify

DEFENSES = Classify.defenses_from[0]
METHODS = Classify.methods

SMALL = {"hidden": 12, "out": 10, "predictor": 6, "bottleneck": 5}  # widths, for methods that have them


def make_method(name, classes=4):
    cls = METHODS.get(name)
    settings = {k: v for k, v in SMALL.items() if k in cls.Config.model_fields}
    torch.manual_seed(0)
    return cls(cls.Config(**settings), encoder=tiny_encoder(), num_classes=classes)


def make_defended(name):
    """The defense around the first method that it accepts."""
    cls = DEFENSES.get(name)
    for method in METHODS.names():
        try:
            torch.manual_seed(0)
            return cls(cls.Config(), Context(1, 4)).wrap(make_method(method))
        except ConfigError:
            continue
    raise AssertionError(f"{name} accepts no method")


def train(method, batch, steps, optimizer=None, *, hold=False):
    """The loss of each step. hold: moving targets and centres stand still, so that the loss keeps its meaning."""
    before = [b.clone() for b in method.buffers()]
    optimizer = optimizer or torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        out = method(batch.replace(draw=step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if hold:
            with torch.no_grad():
                torch._foreach_copy_(list(method.buffers()), before)
        else:
            method.after_step((step + 1) / steps)
        losses.append(out.loss.item())
    return losses


ALL = [("method", n) for n in METHODS.names()] + [("defense", n) for n in DEFENSES.names()]


def make(kind, name):
    method = make_method(name) if kind == "method" else make_defended(name)
    return method.train()


def batch_for(method, size=24):
    return tiny_batch(size, views=method.num_views)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_loss_falls_on_tiny_data(kind, name):
    method = make(kind, name)
    losses = train(method, batch_for(method), 40, hold=True)
    assert all(torch.isfinite(torch.tensor(losses))) and sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_state_dict_is_the_whole_state(kind, name):
    """A copy made from state_dict in the middle goes on exactly as the original (fresh optimisers on both sides)."""
    method, batch = make(kind, name), batch_for(make(kind, name))
    train(method, batch, 3)
    other = make(kind, name)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert train(method, batch, 3) == train(other, batch, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_output_is_a_differentiable_scalar_with_detached_metrics(kind, name):
    method = make(kind, name)
    out = method(batch_for(method))
    assert out.loss.shape == () and out.loss.requires_grad
    assert out.metrics and all(v.shape == () and not v.requires_grad for v in out.metrics.values())


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_loss_does_not_depend_on_the_order_of_samples(kind, name):
    method = make(kind, name)
    batch, order = batch_for(method), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    mixed = batch.replace(
        keys=tuple(batch.keys[i] for i in order),
        x=batch.x[order],
        y=batch.y[order],
        views=tuple(v[order] for v in batch.views),
    )
    a, b = copy.deepcopy(method)(batch).loss, method(mixed).loss
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_step_leaves_the_global_random_state_alone(kind, name):
    method = make(kind, name)
    state = torch.get_rng_state()
    method(batch_for(method)).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", METHODS.names())
def test_logits_are_none_or_one_row_per_sample(name):
    method = make_method(name).eval()
    scores = method.logits(torch.rand(5, 3, 8, 8))
    assert scores is None or scores.shape == (5, 4)
    assert (scores is None) == (not method.has_classifier)


@pytest.mark.parametrize("name", DEFENSES.names())
def test_defense_is_never_told_the_poison(name):
    parameters = set(inspect.signature(DEFENSES.get(name).__init__).parameters)
    assert parameters == {"self", "config", "context"}
    assert not {f for f in DEFENSES.get(name).Config.model_fields if "poison" in f}


def test_the_context_says_nothing_of_the_poison():
    assert {f.name for f in dataclasses.fields(Context)} == {"seed", "num_classes", "model", "words"}


def test_defense_does_nothing_by_default():
    class Nothing(Defense):
        name = "nothing"

    batch, method = tiny_batch(), make_method("supervised")
    defense = Nothing(None, Context(0, 4))
    assert defense.before(batch) is batch and defense.wrap(method) is method and defense.label == "nothing"


def test_small_crops_train_with_every_method():
    """Two large views and two small ones of another size; targets are made of the large ones."""
    small = tiny_batch(12, views=2, side=6).views
    for name in METHODS.names():
        method = make_method(name).train()
        batch = tiny_batch(12, views=method.num_views)
        out = method(batch.replace(views=batch.views + small)) if method.num_views > 1 else method(batch)
        out.loss.backward()
        assert torch.isfinite(out.loss), name

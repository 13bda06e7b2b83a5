"""Many probes at once against one torch optimiser a rate, in float64, and against the exact optimum."""

import pytest
import torch
import torch.nn.functional as F

from poisonshield.evals.linear import linear, linear_sweep, probe_rate
from poisonshield.evals.parts.features import Features


def features(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return Features(centres[y] + 1.5 * torch.randn(count, 6, generator=generator, dtype=dtype), y)


def slow_probe(train, test, rate, *, weight_decay, epochs, batch_size, seed):
    """torch.optim.SGD and autograd, one rate."""
    mean, std = train.h.mean(0), train.h.std(0)
    layer = torch.nn.Linear(6, 4, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        warm = min(1.0, epoch / (0.1 * epochs))
        drops = (epoch >= 0.6 * epochs) + (epoch >= 0.75 * epochs) + (epoch >= 0.9 * epochs)
        optimizer.param_groups[0]["lr"] = rate * warm * 0.2**drops
        for rows in torch.randperm(len(train.y), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer((train.h[rows] - mean) / std), train.y[rows]).backward()
            optimizer.step()
    scores = layer((test.h - mean) / std)
    return 100 * (scores.argmax(1) == test.y).double().mean().item()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_every_probe_equals_its_own_optimiser(weight_decay):
    train, test = features(230, 0), features(150, 1)
    rates = (0.001, 0.03, 1.0)
    settings = {"weight_decay": weight_decay, "epochs": 20, "batch_size": 64, "seed": 5}
    ours = linear_sweep(train, test, num_classes=4, learning_rates=rates, **settings)
    assert list(ours) == list(rates)
    for rate in rates:
        assert ours[rate] == pytest.approx(slow_probe(train, test, rate, **settings), abs=1e-9)
    assert len(set(ours.values())) > 1


def test_schedule_is_that_of_the_authors_probe():
    expected = {1: 1.0, 9: 9.0, 10: 10.0, 59: 10.0, 60: 2.0, 74: 2.0, 75: 0.4, 89: 0.4, 90: 0.08, 100: 0.08}
    for epoch, rate in expected.items():
        assert 10 * probe_rate(epoch, 100) == pytest.approx(rate, rel=1e-12)


def test_a_probe_does_not_depend_on_the_others_in_the_sweep():
    train, test = features(100, 0, torch.float32), features(100, 1, torch.float32)
    settings = {"num_classes": 4, "epochs": 5}
    both = linear_sweep(train, test, learning_rates=(0.01, 0.3), **settings)
    assert both[0.3] == linear_sweep(train, test, learning_rates=(0.3,), **settings)[0.3]


def test_long_training_comes_to_the_exact_optimum():
    train, test = features(200, 0), features(400, 1)
    swept = linear_sweep(
        train, test, num_classes=4, learning_rates=(0.1,), weight_decay=1e-2, epochs=300, batch_size=200
    )
    # Differs by the decay of the bias alone, so by few of 400 samples.
    assert swept[0.1] == pytest.approx(linear(train, test, num_classes=4, weight_decay=1e-2), abs=1.5)


def test_a_diverged_probe_has_no_accuracy_and_leaves_the_others_alone():
    train, test = features(100, 0, torch.float32), features(100, 1, torch.float32)
    out = linear_sweep(train, test, num_classes=4, learning_rates=(0.1, 1e38), weight_decay=1.0, epochs=10)
    assert out[1e38] is None and out[0.1] > 50


def test_inputs_stay_as_they_are():
    train, test = features(50, 0), features(50, 1)
    before = train.h.clone(), test.h.clone()
    linear_sweep(train, test, num_classes=4, learning_rates=(0.1,), epochs=2)
    assert torch.equal(train.h, before[0]) and torch.equal(test.h, before[1])

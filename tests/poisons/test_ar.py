"""AR: the recurrence to the bit, matched filters that tell classes apart untrained, and no straight line that does."""

import pytest
import torch
from torch.nn import functional as F

from poisonshield.errors import ConfigError
from poisonshield.poisons.ar import AR, autoregress
from poisonshield.poisons.base import Radius


@pytest.fixture(scope="module", params=[6, pytest.param(10, marks=pytest.mark.slow)], ids="{} classes".format)
def classes(request):
    """The search for ten processes takes twenty times as long as that for six."""
    return request.param


@pytest.fixture(scope="module")
def images(cifar10, classes):
    """The real images of the first classes."""
    rows = (cifar10.y < classes).nonzero()[:, 0]
    return cifar10.replace(keys=tuple(cifar10.keys[i] for i in rows.tolist()), x=cifar10.x[rows], y=cifar10.y[rows])


@pytest.fixture(scope="module")
def ar(images, classes, built):
    return built(AR, images, num_classes=classes)


@pytest.fixture(scope="module")
def delta(ar, images):
    return ar.delta(images)


def residuals(fields, taps):
    """|conv(field, filter of class k)| summed, [N, K]: zero for the class that made the field."""
    filters = torch.cat([taps, -torch.ones(len(taps), 3, 1, dtype=taps.dtype)], dim=2).view(-1, 3, 3, 3)
    return torch.stack([F.conv2d(fields, f.view(3, 1, 3, 3), groups=3).abs().sum((1, 2, 3)) for f in filters], dim=1)


def test_diagonals_give_the_bits_of_the_loop_over_pixels():
    draw = torch.Generator().manual_seed(0)
    taps = torch.randn(5, 3, 8, generator=draw, dtype=torch.float64)
    taps = taps / taps.sum(2, keepdim=True)
    rows = torch.randn(5, 3, 2, 9, generator=draw, dtype=torch.float64)
    columns = torch.randn(5, 3, 5, 2, generator=draw, dtype=torch.float64)
    slow = torch.zeros(5, 3, 7, 9, dtype=torch.float64)
    slow[:, :, :2], slow[:, :, 2:, :2] = rows, columns
    for n in range(5):
        for c in range(3):
            for i in range(2, 7):
                for j in range(2, 9):
                    total = 0.0
                    for t in range(8):
                        u, v = divmod(t, 3)
                        total = total + float(taps[n, c, t]) * float(slow[n, c, i - 2 + u, j - 2 + v])
                    slow[n, c, i, j] = total
    assert torch.equal(autoregress(rows, columns, taps), slow)


def test_radius_is_one(ar, delta):
    assert ar.budget() == Radius("l2", 1.0)
    assert (delta.double().square().flatten(1).sum(1).sqrt() - 1).abs().max() < 1e-5


def test_own_filter_answers_with_silence(ar, delta, images):
    own = residuals(delta[:500], ar.taps)[torch.arange(500), images.y[:500]] / (3 * 30 * 30)
    assert own.max() < 1e-5  # mean residual of the recurrence, float32


def test_matched_filters_tell_all_images_apart_before_and_after_rounding(ar, delta, images):
    assert torch.equal(residuals(delta, ar.taps).argmin(1), images.y)
    eight_bit = (delta * 255).round() / 255
    assert torch.equal(residuals(eight_bit, ar.taps).argmin(1), images.y)


def test_no_line_separates_the_perturbations(delta, images, linear_accuracy):
    half = len(delta) // 2
    assert linear_accuracy(delta[:half], images.y[:half], delta[half:], images.y[half:]) < 60


def test_a_hundred_signals_of_each_class_are_finite_and_heard(ar, images, classes):
    y = torch.arange(classes).repeat_interleave(100)
    keys = tuple(f"seed-{i}" for i in range(len(y)))
    batch = images.replace(keys=keys, x=torch.full((len(y), 3, 32, 32), 0.5), y=y)
    delta = ar.delta(batch)
    assert delta.isfinite().all() and (delta.double().square().flatten(1).sum(1).sqrt() - 1).abs().max() < 1e-5
    assert delta.abs().flatten(1).amax(1).max() < 0.5  # no single pixel carries it all


def test_coefficients_follow_the_rule(ar, classes):
    assert (ar.taps.sum(2) - 1).abs().max() < 1e-4
    assert len({tuple(t.flatten().tolist()) for t in ar.taps}) == classes


def test_search_that_cannot_succeed_says_so(monkeypatch, mini, built):
    monkeypatch.setattr("poisonshield.poisons.ar.MAX_ROUNDS", 1)
    monkeypatch.setattr("poisonshield.poisons.ar.CANDIDATES", 256)
    with pytest.raises(ConfigError, match="of 10 processes with min_response 500.\n  Lower min_response"):
        built(AR, mini, min_response=500)

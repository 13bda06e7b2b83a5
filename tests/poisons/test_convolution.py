"""CUDA: the filter of a class can be read off its images, and images are as bright as they can be."""

import pytest
import torch
from torch.nn import functional as F

from poisonshield.errors import ConfigError
from poisonshield.poisons.convolution import Convolution


def unrounded(poison, batch):
    """x + delta before rounding."""
    return batch.x + poison.delta(batch)


def fitted_filter(x, blurred):
    """Least squares over the interior of one image: the 9 taps that make `blurred` from x, float64."""
    columns = F.unfold(x[:, None].double(), 3).transpose(1, 2).reshape(-1, 9)  # channels are samples: [3 * 900, 9]
    target = blurred[:, 1:-1, 1:-1].double().reshape(-1, 1)
    return torch.linalg.lstsq(columns, target).solution[:, 0]


def test_filter_of_each_class_is_recovered_up_to_scale(cifar10, built):
    poison = built(Convolution, cifar10)
    blurred = unrounded(poison, cifar10)
    for k in range(10):
        for i in (cifar10.y == k).nonzero()[:5, 0].tolist():
            taps = fitted_filter(cifar10.x[i], blurred[i])
            want = poison.filters[k].flatten().double()
            error = (taps / taps.norm() - want / want.norm()).norm()
            assert error < 1e-4, (k, i, error)


def test_brightest_value_of_each_image_is_one(cifar10, built):
    released = built(Convolution, cifar10).apply(cifar10).x
    assert torch.equal(released.flatten(1).amax(1), torch.ones(len(cifar10)))


def test_released_pixels_equal_a_slow_convolution(mini, built):
    poison = built(Convolution, mini)
    released = poison.apply(mini).x
    for i in range(20):
        levels, taps = (mini.x[i] * 255).round().double(), poison.filters[mini.y[i]].double()
        padded = F.pad(levels, (1, 1, 1, 1))
        total = torch.zeros(3, 32, 32, dtype=torch.float64)
        for u in range(3):
            for v in range(3):
                total += taps[u, v] * padded[:, u : u + 32, v : v + 32]
        exact = 255 * total / total.max()
        near_tie = (exact - exact.floor() - 0.5).abs() < 1e-3  # either neighbour is the nearest level there
        assert ((released[i] * 255).round() == exact.round())[~near_tie].all()


def test_filters_have_one_full_tap_and_the_rest_below_blur(mini, built):
    taps = built(Convolution, mini, size=5, blur=0.2).filters.flatten(1)
    assert torch.equal((taps == 1).sum(1), torch.ones(10, dtype=torch.int64))
    assert (taps.sort(1).values[:, :-1] <= 0.2).all() and taps.min() >= 0


def test_seed_decides_the_filters(mini, built):
    a, b, other = (built(Convolution, mini, seed=s).filters for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert len({tuple(f.flatten().tolist()) for f in a}) == 10


def test_black_image_stays_black(mini, built):
    batch = mini.replace(keys=mini.keys[:1], x=torch.zeros(1, 3, 32, 32), y=mini.y[:1])
    assert built(Convolution, mini).apply(batch).x.abs().max() == 0


def test_even_filter_is_refused():
    with pytest.raises((ConfigError, ValueError), match="use an odd size"):
        Convolution.Config(size=4)

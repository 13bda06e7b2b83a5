"""`regions` and `class_noise`: exact in l-infinity, separable by a line, and gone when that line is projected out."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.errors import ConfigError
from poisonshield.poisons.class_noise import ClassNoise
from poisonshield.poisons.regions import Regions

MAKERS = [
    pytest.param(Regions, {"num_regions": 4}, id="regions-4"),
    pytest.param(Regions, {"num_regions": 16}, id="regions-16"),
    pytest.param(ClassNoise, {}, id="class_noise"),
    pytest.param(ClassNoise, {"kind": "sign"}, id="class_noise-sign"),
]


@pytest.mark.parametrize(("cls", "settings"), MAKERS)
def test_radius_is_exact_before_and_after_rounding(cls, settings, cifar10, built):
    poison = built(cls, cifar10, **settings)
    delta = poison.delta(cifar10)
    assert delta.abs().max() <= 8 / 255
    levels = ((poison.apply(cifar10).x - cifar10.x) * 255).round().abs().max()
    assert levels == 8
    if cls is Regions or settings:
        assert torch.allclose(delta.abs(), torch.full_like(delta, 8 / 255))  # on the corners everywhere


@pytest.mark.parametrize(("cls", "settings"), MAKERS)
def test_orthogonal_projection_removes_it(cls, settings, cifar10, built, linear_accuracy):
    """Fit one-hot classes linearly, project all data off the fitted directions, fit again: nothing is left to find."""
    delta = built(cls, cifar10, **settings).delta(cifar10).flatten(1).double()
    train, test = slice(0, 2500), slice(2500, 5000)
    y = cifar10.y
    assert linear_accuracy(delta[train], y[train], delta[test], y[test]) == 100.0
    centred = delta - delta[train].mean(0)
    # The classes' own patterns span all directions that a linear fit can use here (K - 1 of them after centring).
    fitted = torch.stack([centred[train][y[train] == k].mean(0) for k in range(10)])
    basis = torch.linalg.svd(fitted, full_matrices=False).Vh[:9]
    removed = centred - centred @ basis.T @ basis
    removed = removed + 1e-6 * torch.randn(
        removed.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert linear_accuracy(removed[train], y[train], removed[test], y[test]) <= 10 + 5


def test_regions_are_solid_squares_of_corner_colours(mini, built):
    delta = built(Regions, mini, num_regions=16).delta(mini)
    assert torch.allclose(delta.abs(), torch.full_like(delta, 8 / 255))
    for i in range(0, 32, 8):
        for j in range(0, 32, 8):
            block = delta[:, :, i : i + 8, j : j + 8].flatten(2)
            assert torch.equal(block.amin(2), block.amax(2))


def test_all_classes_differ(mini, built):
    for cls in (Regions, ClassNoise):
        delta = built(cls, mini).delta(mini)
        assert len({tuple(delta[(mini.y == k).nonzero()[0, 0]].flatten().tolist()) for k in range(10)}) == 10


def test_sides_that_do_not_divide_are_cut_into_nearly_equal_parts(built):
    batch = Batch(("a",), torch.full((1, 3, 7, 10), 0.5), y=torch.zeros(1, dtype=torch.int64))
    signs = built(Regions, batch, num_classes=1, num_regions=9).delta(batch)[0, 0].sign()
    blocks = [signs[a:b, c:d] for a, b in ((0, 3), (3, 5), (5, 7)) for c, d in ((0, 4), (4, 7), (7, 10))]
    assert all(torch.equal(b, b[:1, :1].expand_as(b)) for b in blocks)


def test_number_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="5 regions do not make a square grid"):
        Regions.Config(num_regions=5)


def test_too_many_classes_for_the_patterns_are_refused():
    with pytest.raises(ConfigError, match="9 classes need different patterns"):
        Regions(Regions.Config(num_regions=1), num_classes=9, image_size=(8, 8), seed=0)

"""LSP: exact radius, constant cells, and separable by a line, on real images."""

import math

import pytest
import torch

from poisonshield.errors import ConfigError
from poisonshield.poisons.lsp import LSP


def test_radius_is_exact_for_every_image(cifar10, built):
    poison = built(LSP, cifar10)
    length = poison.delta(cifar10).double().square().flatten(1).sum(1).sqrt()
    assert poison.budget().norm == "l2"
    assert poison.budget().radius == pytest.approx(6 / 255 * math.sqrt(3 * 32 * 32))
    assert (length - poison.budget().radius).abs().max() < 1e-5


def test_linf_budget_is_exact_too(mini, built):
    delta = built(LSP, mini, budget="linf", eps=8 / 255).delta(mini)
    assert (delta.abs().flatten(1).amax(1) - 8 / 255).abs().max() < 1e-7


def test_l2_radius_is_no_linf_bound(mini, built):
    largest = built(LSP, mini).delta(mini).abs().flatten(1).amax(1) * 255
    assert largest.max() > 12 and 8 < largest.mean() < 13  # measured for the published form: mean 10.5, maximum 15.9


def test_each_cell_is_one_colour(cifar10, built):
    delta = built(LSP, cifar10).delta(cifar10)
    for i in range(0, 32, 8):
        for j in range(0, 32, 8):
            cell = delta[:, :, i : i + 8, j : j + 8].flatten(2)
            assert torch.equal(cell.amin(2), cell.amax(2))


def test_line_separates_held_out_perturbations_completely(cifar10, built, linear_accuracy):
    delta = built(LSP, cifar10).delta(cifar10)
    cells = delta[:, :, ::8, ::8]  # all that differs between pixels
    assert linear_accuracy(cells[:2500], cifar10.y[:2500], cells[2500:], cifar10.y[2500:]) == 100.0


def test_unbalanced_classes_each_get_their_own_pattern(mini, built, linear_accuracy):
    keep = torch.cat([(mini.y == k).nonzero()[:, 0][: 20 + 15 * k] for k in range(10)])
    few = mini.replace(keys=tuple(mini.keys[i] for i in keep.tolist()), x=mini.x[keep], y=mini.y[keep])
    delta = built(LSP, few).delta(few)
    assert len(delta) == sum(20 + 15 * k for k in range(10))
    cells, even = delta[:, :, ::8, ::8], torch.arange(len(keep)) % 2 == 0
    assert linear_accuracy(cells[even], few.y[even], cells[~even], few.y[~even]) == 100.0


def test_patch_that_does_not_divide_the_image_is_cut_at_the_edge(built):
    from poisonshield.batch import Batch

    batch = Batch(("a", "b"), torch.full((2, 3, 10, 14), 0.5), y=torch.tensor([0, 1]))
    delta = built(LSP, batch, num_classes=2, patch=4).delta(batch)
    assert delta.shape == (2, 3, 10, 14)
    assert torch.equal(delta[:, :, 8, 12], delta[:, :, 9, 13])


def test_more_classes_than_vertices_are_refused(built, mini):
    with pytest.raises(ConfigError, match="9 classes need different patterns, but 3 signs give only 8"):
        built(LSP, mini.replace(y=mini.y % 9), num_classes=9, patch=32)

"""The masked diffusion loss against loops in float64, and masks whose area survives the way to the latents."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from poisonshield.errors import ConfigError, DataError, ShapeError
from poisonshield.losses.zone import Zone, latent_mask, zone_loss

NORMS = ("per_image", "batch", "plain")
SIDE = 512


def drawn(batch=3, channels=4, side=(6, 5), seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(batch, channels, *side, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(batch, 1, *side, generator=draw, dtype=torch.float64)
    return pred.to(dtype), target.to(dtype), mask.to(dtype)


def slow(pred, target, mask, norm, smallest):
    """The three formulas, element by element."""
    batch, channels, height, width = pred.shape
    sums, areas = [0.0] * batch, [0.0] * batch
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                m = float(mask[b, 0, i, j])
                areas[b] += m
                for c in range(channels):
                    sums[b] += m * (float(pred[b, c, i, j]) - float(target[b, c, i, j])) ** 2
    if norm == "plain":
        return sum(sums) / (batch * channels * height * width)
    if norm == "batch":
        return sum(sums) / (channels * sum(areas))
    return sum(s / (channels * max(a, smallest)) for s, a in zip(sums, areas, strict=True)) / batch


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shrink", [1.0, 0.2, 0.01])  # at 0.01 a whole mask is less than a cell
def test_equals_a_loop_over_elements(norm, shrink):
    pred, target, mask = drawn()
    mask = mask * shrink
    wanted = slow(pred, target, mask, norm, 4)
    terms = zone_loss(pred, target, mask, Zone(norm))
    assert terms.shape == (3,) and terms.mean().item() == pytest.approx(wanted, rel=1e-12)
    terms = zone_loss(pred.float(), target.float(), mask.float(), Zone(norm))
    assert terms.dtype == torch.float32 and terms.mean().item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_is_autograds_of_the_formula(norm):
    pred, target, mask = drawn()
    pred.requires_grad_()
    (ours,) = torch.autograd.grad(zone_loss(pred, target, mask, Zone(norm)).mean(), pred)
    square, area = (mask * (pred - target) ** 2).sum((1, 2, 3)), mask.sum((1, 2, 3))
    plain = {
        "plain": square.sum() / pred.numel(),
        "batch": square.sum() / (4 * area.sum()),
        "per_image": (square / (4 * area.clamp(min=4))).mean(),
    }[norm]
    (wanted,) = torch.autograd.grad(plain, pred)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_outside_a_binary_mask_is_exactly_zero(norm):
    pred, target, mask = drawn(dtype=torch.float32)
    mask = (mask > 0.5).float()
    pred.requires_grad_()
    zone_loss(pred, target, mask, Zone(norm)).mean().backward()
    outside = (mask == 0).expand_as(pred)
    assert torch.all(pred.grad[outside] == 0) and torch.all(pred.grad[~outside] != 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_floor_one_equals_no_mask_bit_for_bit(norm, dtype):
    pred, target, mask = drawn(side=(8, 8), dtype=dtype)
    zone = Zone(norm, floor=1.0)
    pixels = F.interpolate(mask.float(), (64, 64))
    everywhere = latent_mask(pixels, (8, 8), zone)
    grads, losses = [], []
    for m in (everywhere, None):
        p = pred.clone().requires_grad_()
        losses.append(zone_loss(p, target, m, zone))
        losses[-1].mean().backward()
        grads.append(p.grad)
    assert torch.equal(*losses) and torch.equal(*grads)


def test_floor_one_equals_no_mask_on_latents_below_min_cells():
    pred, target, _ = drawn(side=(1, 2))
    assert torch.equal(zone_loss(pred, target, torch.ones(3, 1, 1, 2), Zone()), zone_loss(pred, target, None, Zone()))


def test_no_mask_is_the_mean_squared_error():
    pred, target, _ = drawn()
    for norm in NORMS:
        assert zone_loss(pred, target, None, Zone(norm)).mean().item() == pytest.approx(F.mse_loss(pred, target).item())


def test_plain_is_the_error_of_masked_against_masked():
    pred, target, mask = drawn()
    mask = (mask > 0.5).double()
    assert zone_loss(pred, target, mask, Zone("plain")).mean().item() == pytest.approx(
        F.mse_loss(pred * mask, target * mask).item(), rel=1e-12
    )


def test_halving_the_mask_changes_plain_alone_while_it_is_large():
    pred, target, mask = drawn(side=(8, 8))
    whole = {norm: zone_loss(pred, target, mask, Zone(norm)) for norm in NORMS}
    half = {norm: zone_loss(pred, target, mask / 2, Zone(norm)) for norm in NORMS}
    assert (mask.sum((1, 2, 3)) / 2 >= 4).all()
    torch.testing.assert_close(half["batch"], whole["batch"], rtol=1e-12, atol=0)
    torch.testing.assert_close(half["per_image"], whole["per_image"], rtol=1e-12, atol=0)
    torch.testing.assert_close(half["plain"], whole["plain"] / 2, rtol=1e-12, atol=0)


def test_per_image_gives_small_objects_the_weight_of_large_ones():
    pred, target = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4, :4], mask[1, :, :8, :8] = 1, 1
    assert zone_loss(pred, target, mask, Zone("per_image")).tolist() == [1.0, 1.0]
    assert zone_loss(pred, target, mask, Zone("plain")).tolist() == [0.25, 1.0]


def ellipse():
    y, x = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None]
    return ((((x - 252) / 120.0) ** 2 + ((y - 258) / 170.0) ** 2) < 1).float()[None, None]


def stroke():
    y, x = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None]
    return ((x - y).abs() < 3).float()[None, None]


@pytest.mark.parametrize(
    ("mask", "shares"),
    [
        (ellipse(), {"area": 24.436, "nearest": 24.463, "bilinear": 24.316, "max": 26.025}),
        (stroke(), {"area": 0.974, "nearest": 1.562, "bilinear": 1.562, "max": 4.639}),
    ],
    ids=["ellipse", "stroke"],
)
def test_area_alone_keeps_the_share_of_an_ellipse_and_of_a_thin_stroke(mask, shares):
    assert 100 * mask.mean().item() == pytest.approx(shares["area"], abs=0.001)
    for resize in ("area", "nearest", "max"):
        small = latent_mask(mask, (64, 64), Zone(resize=resize, dilate=0))
        assert 100 * small.mean().item() == pytest.approx(shares[resize], abs=0.01), resize
    small = F.interpolate(mask, (64, 64), mode="bilinear", align_corners=False)  # what we do not offer
    assert 100 * small.mean().item() == pytest.approx(shares["bilinear"], abs=0.01)


@pytest.mark.parametrize(("side", "size"), [((51, 70), (7, 9)), ((5, 4), (8, 8)), ((64, 48), (8, 6))])
def test_area_is_kept_at_sizes_that_do_not_divide(side, size):
    mask = torch.rand(2, 1, *side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = latent_mask(mask, size, Zone(dilate=0))
    torch.testing.assert_close(small.mean((1, 2, 3)), mask.mean((1, 2, 3)), rtol=1e-12, atol=0)
    full = latent_mask(torch.ones(1, 1, *side), size, Zone(dilate=0))
    torch.testing.assert_close(full, torch.ones_like(full), rtol=0, atol=1e-6)


def test_area_equals_average_pooling_where_sizes_divide():
    mask = torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latent_mask(mask, (3, 4), Zone(dilate=0)), F.avg_pool2d(mask, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dilate", [0, 1, 2])
def test_dilation_is_counted_in_latent_cells(dilate):
    mask = torch.zeros(1, 1, 72, 72)
    mask[..., 32:40, 32:40] = 1  # one cell of nine by nine
    small = latent_mask(mask, (9, 9), Zone(dilate=dilate))
    assert small.sum().item() == (2 * dilate + 1) ** 2
    assert small[..., 4 - dilate : 5 + dilate, 4 - dilate : 5 + dilate].min() == 1


def test_floor_lifts_the_outside_alone():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    small = latent_mask(mask, (8, 8), Zone(floor=0.25, dilate=0))
    assert small.unique().tolist() == [0.25, 1.0] and torch.equal(small > 0.5, mask)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_empty_mask_is_refused_by_its_row(floor):
    mask = torch.ones(3, 1, 16, 16)
    mask[1] = 0
    with pytest.raises(DataError, match=r"mask of row 1 is empty"):
        latent_mask(mask, (2, 2), Zone(floor=floor))


def test_mask_lost_between_cells_is_refused_with_the_way_out():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5, 5] = 1
    with pytest.raises(DataError, match="resize: max"):
        latent_mask(mask, (2, 2), Zone(resize="nearest", dilate=0))
    assert latent_mask(mask, (2, 2), Zone(resize="max", dilate=0)).sum() == 1


def test_shapes_that_do_not_fit_are_refused():
    pred, target, _ = drawn()
    with pytest.raises(ShapeError, match="latent_mask"):
        zone_loss(pred, target, torch.ones(3, 1, 48, 40), Zone())
    with pytest.raises(ShapeError, match=r"\[B, 1, H, W\]"):
        latent_mask(torch.ones(3, 2, 8, 8), (4, 4), Zone())


@pytest.mark.parametrize(
    "change", [{"norm": "mean"}, {"resize": "bilinear"}, {"floor": 1.5}, {"dilate": -1}, {"min_cells": 0}]
)
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(Zone(), **change)


def test_weights_of_small_masks_are_finite():
    pred, target, mask = drawn(dtype=torch.float32)
    for norm in NORMS:
        assert math.isfinite(zone_loss(pred, target, mask * 1e-4, Zone(norm)).mean().item())

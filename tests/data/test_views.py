"""Views and augmentations: equal to torchvision where it has the operation, and keyed by sample, not by place."""

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from pydantic import ValidationError

from poisonshield.batch import Batch
from poisonshield.data import augment
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.errors import ConfigError
from poisonshield.ops.augment import reference
from poisonshield.random import philox_uniform


def images(count=6, height=40, width=30):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def uniforms(count, n):
    return philox_uniform((count, n), 0)


def jittered_by(x, u, *, strength, hue):
    """Colours changed as planned from u [B, 8]."""
    return reference.color_jitter(x, *augment.jitter(u, strength=strength, hue=hue))


BOXES = torch.tensor([[0, 0, 40, 30], [3, 4, 10, 10], [5, 1, 30, 20], [0, 0, 16, 16], [10, 10, 8, 20], [2, 2, 33, 28]])


@pytest.mark.parametrize("size", [1, 7, 16, 48])
def test_resized_crop_equals_torchvision_antialiased(size):
    x = images()
    ours = reference.resized_crop(x, BOXES.float(), size)
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        theirs = tv.resized_crop(x[i], top, left, height, width, [size, size], antialias=True)
        torch.testing.assert_close(ours[i], theirs, atol=2e-6, rtol=0)


def test_flip_in_the_crop_is_a_flip_after_it():
    x, flip = images(), torch.tensor([True, False] * 3)
    plain, flipped = reference.resized_crop(x, BOXES.float(), 9), reference.resized_crop(x, BOXES.float(), 9, flip)
    torch.testing.assert_close(flipped[flip], plain[flip].flip(3))
    assert torch.equal(flipped[~flip], plain[~flip])


def test_crop_boxes_have_the_areas_and_ratios_asked_for():
    boxes = augment.crop_boxes(uniforms(20000, 22), 32, 32, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area, ratio = height * width / 32**2, width / height
    assert area.min() > 0.17 and ratio.min() > 0.68 and ratio.max() < 1.48  # sides are rounded to whole pixels
    # The mean over torchvision's own draws, from the same rule: 0.5505 +- 0.002 for 20,000 draws.
    assert area.mean().item() == pytest.approx(0.5505, abs=0.01)


def test_crop_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32)
    draws = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(8000)]
    theirs = torch.tensor(draws).float()
    ours = augment.crop_boxes(uniforms(8000, 22), 32, 32, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    for column in range(4):
        a, b = ours[:, column].sort().values, theirs[:, column].sort().values
        assert (a - b).abs().mean() < 0.25  # mean distance between quantiles, in pixels


def test_crop_falls_back_to_the_centre_when_nothing_fits():
    boxes = augment.crop_boxes(uniforms(3, 22), 10, 100, area=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
    assert boxes[0].tolist() == [0, 43, 10, 13]


def test_shifted_crop_equals_pad_crop_flip():
    x, u = images(5, 8, 8), uniforms(5, 3)
    ours = augment.shifted_crop(x, u, padding=2)
    for i in range(5):
        top, left = int(u[i, 0] * 5), int(u[i, 1] * 5)
        padded = torch.zeros(3, 12, 12)
        padded[:, 2:10, 2:10] = x[i]
        expected = padded[:, top : top + 8, left : left + 8]
        assert torch.equal(ours[i], expected.flip(2) if u[i, 2] < 0.5 else expected)


@pytest.mark.parametrize("shift", [0.0, 0.07, -0.1, 0.5])
def test_hue_equals_torchvision(shift):
    x = images()
    x[0] = 0.5  # grey has no hue
    ours = reference.shift_hue(x, torch.full((6,), shift))
    torch.testing.assert_close(ours, tv.adjust_hue(x, shift), atol=1e-5, rtol=0)


def test_color_jitter_equals_torchvisions_operations_in_the_drawn_order():
    x, u = images(), uniforms(6, 8)
    ours = jittered_by(x, u, strength=0.4, hue=0.1)
    factor, turn, order = 1 + 0.4 * (2 * u[:, :3] - 1), 0.1 * (2 * u[:, 3] - 1), u[:, 4:8].argsort(1)
    for i in range(6):
        y = x[i]
        for kind in order[i].tolist():
            if kind == 3:
                y = tv.adjust_hue(y, float(turn[i]))
            else:
                y = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation][kind](y, float(factor[i, kind]))
        torch.testing.assert_close(ours[i], y, atol=2e-3, rtol=0)  # torchvision's luma weights have four digits


def test_blur_equals_a_dense_gaussian_and_keeps_flat_images():
    x = images(2, 12, 12)
    ours = reference.gaussian_blur(x, torch.tensor([1.0, 0.1]))
    at = torch.arange(12.0)
    w = torch.exp(-((at[:, None] - at) ** 2) / 2)
    w = w / w.sum(1, keepdim=True)
    torch.testing.assert_close(ours[0], w @ x[0] @ w.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], x[1])  # sigma 0.1 is the identity at 8 bits, as published defenses overlooked
    flat = torch.full((1, 3, 9, 9), 0.3)
    torch.testing.assert_close(reference.gaussian_blur(flat, torch.tensor([2.0])), flat)


@pytest.mark.parametrize("name", ["crop_flip", "ssl"])
@pytest.mark.parametrize("side", [32, 80])
def test_views_depend_on_key_epoch_and_seed_only(name, side):
    x = images(8, side, side)
    keys = tuple(f"k{i}" for i in range(8))
    make = Views(ViewsConfig(), default=name, count=2, seed=3)
    whole = make(Batch(keys, x)).views
    rows = [5, 1, 6]
    part = make(Batch(tuple(keys[i] for i in rows), x[rows])).views
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[rows], b, atol=1e-6, rtol=0)
        assert a.shape == x.shape and a.min() >= 0 and a.max() <= 1
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], make(Batch(keys, x, draw=1)).views[0])
    assert not torch.equal(whole[0], Views(ViewsConfig(), default=name, count=1, seed=4)(Batch(keys, x)).views[0])


@pytest.mark.parametrize("name", ["crop_flip", "ssl", "test", "none"])
@pytest.mark.parametrize("side", [32, 70])
def test_8_bit_pixels_give_the_views_of_their_floats(name, side):
    x = (images(4, side, side) * 256).to(torch.uint8)
    small = {"local": 1, "local_size": 16} if name in ("crop_flip", "ssl") else {}
    make = Views(ViewsConfig(**small), default=name, count=2, seed=3)
    ours, expected = (make(Batch(("a", "b", "c", "d"), v)).all_views() for v in (x, x / 255))
    assert len(ours) == 2 + len(small) // 2
    for view, plain in zip(ours, expected, strict=True):
        assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(view, plain, atol=2e-6, rtol=0)


def test_views_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Views(ViewsConfig(), default="ssl", count=2, seed=0)(Batch(("a", "b"), images(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_output_size_is_the_configs():
    views = Views(ViewsConfig(size=20), default="crop_flip", count=1, seed=0)(Batch(("a",), images(1, 40, 40))).views
    assert views[0].shape == (1, 3, 20, 20)


def test_a_setting_chooses_the_form_of_the_supervised_crop():
    small, large = Batch(("a", "b"), images(2, 32, 32)), Batch(("a", "b"), images(2, 80, 80))

    def view(batch, **settings):
        return Views(ViewsConfig(**settings), default="crop_flip", count=1, seed=0)(batch).views[0]

    black = (view(small, random_resized_crop=False) == 0).all(1)
    assert black[:, 0].all(1).any() or black[:, -1].all(1).any()  # shifted, so a border of padding
    assert torch.equal(view(small), view(small, random_resized_crop=False))
    assert torch.equal(view(large), view(large, random_resized_crop=True))
    assert not torch.equal(view(small), view(small, random_resized_crop=True))
    assert torch.equal(view(large), view(large, min_area=0.08)) and not torch.equal(
        view(large), view(large, min_area=0.2)
    )
    assert view(large, random_resized_crop=False).shape == (2, 3, 80, 80)
    with pytest.raises(ConfigError, match="images have 80 rows and views.size asks for 32. Set it to true"):
        view(large, random_resized_crop=False, size=32)


def test_the_test_view_is_the_middle_and_draws_nothing():
    x = images(2, 50, 40)
    make = Views(ViewsConfig(name="test", size=28), default="ssl", count=1, seed=0)
    out = make(Batch(("a", "b"), x)).views[0]
    torch.testing.assert_close(out, tv.center_crop(tv.resize(x, [32], antialias=True), [28]), atol=2e-6, rtol=0)
    assert torch.equal(out, make(Batch(("c", "d"), x, draw=3)).views[0])


def test_a_blur_kernel_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="8 has no middle pixel"):
        ViewsConfig(blur_kernel=8)


def test_augmentations_are_differentiable_in_the_pixels():
    x = images(3, 6, 6).double().requires_grad_()
    u = uniforms(3, 8).double()
    boxes = torch.tensor([[0, 0, 6, 6], [1, 1, 4, 5], [2, 0, 3, 3.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: reference.resized_crop(v, boxes, 4), x)
    assert torch.autograd.gradcheck(lambda v: reference.gaussian_blur(v, torch.tensor([0.5, 1.0, 2.0]).double()), x)
    inner = (0.3 + 0.2 * images(3, 6, 6).double()).requires_grad_()  # away from the clamps
    assert torch.autograd.gradcheck(lambda v: jittered_by(v, u, strength=0.2, hue=0.05), inner)


def test_local_crops_are_small_in_size_and_area():
    ramp = torch.linspace(0, 1, 64).expand(32, 3, 64, 64)
    config = ViewsConfig(size=48, jitter=0, hue=0, gray_p=0, blur_p=0, local=3, local_size=24, local_area=(0.05, 0.14))
    batch = Views(config, default="ssl", count=2, seed=0)(Batch(tuple(f"{i}" for i in range(32)), ramp))
    assert [v.shape[2] for v in batch.views] == [48, 48, 24, 24, 24]
    for v in batch.views[2:]:
        span = v.amax((1, 2, 3)) - v.amin((1, 2, 3))  # the share of the image's width, at most sqrt(0.14 * 4/3)
        assert (span < 0.45).all() and not torch.equal(v, batch.views[2 if v is not batch.views[2] else 3])


def test_more_large_views_may_be_asked_for():
    batch = Views(ViewsConfig(count=3), default="ssl", count=2, seed=0)(Batch(("a", "b"), images(2)))
    assert len(batch.views) == 3


def test_local_crops_need_a_size():
    with pytest.raises(ValidationError, match="local_size"):
        ViewsConfig(local=2)
    with pytest.raises(ValidationError, match="smaller one first"):
        ViewsConfig(local_area=(0.5, 0.2))

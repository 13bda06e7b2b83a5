"""Augmentations against torchvision and Pillow with the same parameters, and their draws against torchvision's.

Tolerances: 1 level of 255 beside Pillow, which rounds down after each operation; 2 where it also rounds the gray
that it mixes in (contrast, saturation) and for its Gaussian, which is three box blurs; 1e-5 beside torchvision.
"""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp

from poisonshield.batch import Batch
from poisonshield.data import augment
from poisonshield.data.views import ViewsConfig, center_crop, crop_flip, ssl
from poisonshield.ops.augment import reference
from poisonshield.random import KeyedRandom, philox_uniform

LEVEL = 1 / 255
DRAWS = 4000


def photo(height=44, width=36):
    """Smooth colours with edges, uint8 [3, H, W]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([torch.sin(5 * x + 2 * y), torch.cos(4 * y - x), torch.sin(7 * x * y + 1)])
    image = 0.5 + 0.3 * waves
    image[:, height // 4 : height // 2, width // 3 : width // 2] += 0.15
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def unit(image):
    """A Pillow image or uint8 tensor as float [1, 3, H, W]."""
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    return image[None].float() / 255


def close(ours, theirs, levels):
    worst = (ours - theirs).abs().max().item() / LEVEL
    assert worst <= levels + 1e-3, f"{worst:.3f} levels apart"


def jittered_by(x, u, *, strength, hue):
    """Colours changed as planned from u [B, 8]."""
    return reference.color_jitter(x, *augment.jitter(u, strength=strength, hue=hue))


def jittered(x, kind, amount):
    """Only one of brightness, contrast, saturation (a factor in 0 to 2) or hue (turns) through `color_jitter`."""
    u = torch.full((1, 8), 0.5)
    u[0, kind] = amount if kind == 3 else amount / 2
    return jittered_by(x, u, strength=1.0 if kind < 3 else 0.0, hue=0.0)


@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.4])
@pytest.mark.parametrize(
    ("kind", "adjust", "levels"),
    [(0, tv.adjust_brightness, 1), (1, tv.adjust_contrast, 2), (2, tv.adjust_saturation, 2)],
    ids=["brightness", "contrast", "saturation"],
)
def test_colour_factors_equal_pillows_and_torchvisions(kind, adjust, levels, factor):
    x = unit(photo())
    ours = jittered(x, kind, factor)
    close(ours, unit(adjust(pil(photo()), factor)), levels)
    torch.testing.assert_close(ours, adjust(x, factor), atol=2e-4, rtol=0)  # torchvision's luma has four digits


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.0, 0.06, 0.1])
def test_hue_equals_torchvisions_and_turns_as_pillows(turn):
    x = unit(photo())
    ours = reference.shift_hue(x, torch.tensor([turn]))
    torch.testing.assert_close(ours, tv.adjust_hue(x, turn), atol=1e-5, rtol=0)
    theirs = unit(tv.adjust_hue(pil(photo()), turn))
    same = reference.shift_hue(
        x, torch.tensor([int(turn * 255) / 256])
    )  # Pillow's hue is a byte: the turn it really makes
    spread = x.max(1, keepdim=True).values - x.min(1, keepdim=True).values
    assert ((same - theirs).abs() <= spread * 6 / 256 + 2 * LEVEL).all()  # and one step of that byte, by rounding


def test_grayscale_equals_pillows_and_torchvisions():
    x = unit(photo())
    close(reference.grayscale(x), unit(tv.rgb_to_grayscale(pil(photo()), 3)), 1)
    torch.testing.assert_close(reference.grayscale(x), tv.rgb_to_grayscale(x, 3), atol=2e-4, rtol=0)


@pytest.mark.parametrize("box", [(0, 0, 44, 36), (3, 5, 20, 17), (10, 2, 33, 30), (0, 0, 9, 12)])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_resized_crop_equals_pillows_and_torchvisions(box, size):
    x = unit(photo())
    boxes = torch.tensor([box], dtype=torch.float32)
    ours = reference.resized_crop(x, boxes, size)
    close(ours, unit(tv.resized_crop(pil(photo()), *box, [size, size])), 1)
    torch.testing.assert_close(ours, tv.resized_crop(x, *box, [size, size], antialias=True), atol=1e-5, rtol=0)
    flipped = reference.resized_crop(x, boxes, size, torch.tensor([True]))
    close(flipped, unit(tv.horizontal_flip(tv.resized_crop(pil(photo()), *box, [size, size]))), 1)


@pytest.mark.parametrize(("height", "width"), [(44, 36), (36, 44), (32, 32), (33, 50), (500, 375)])
@pytest.mark.parametrize("size", [28, 32])
def test_test_view_equals_resize_and_centre_crop(height, width, size):
    shorter = round(256 / 224 * size)
    assert {28: 32, 32: 37}[size] == shorter
    ours = augment.resized_center_crop(unit(photo(height, width)), shorter=shorter, size=size)
    theirs = tv.center_crop(tv.resize(pil(photo(height, width)), [shorter]), [size])
    close(ours, unit(theirs), 1)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_equals_torchvisions(sigma):
    x = unit(photo())
    for kernel in (3, 9, 25):  # with its mirrored border
        ours = reference.gaussian_blur(x, torch.tensor([sigma]), kernel=kernel)
        torch.testing.assert_close(ours, tv.gaussian_blur(x, [kernel, kernel], [sigma, sigma]), atol=1e-5, rtol=0)
    whole = reference.gaussian_blur(x, torch.tensor([sigma]))
    theirs = tv.gaussian_blur(x, [25, 25], [sigma, sigma])
    inner = (..., slice(12, -12), slice(12, -12))  # the whole Gaussian has no mirror at its border
    torch.testing.assert_close(whole[inner], theirs[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_near_pillows_three_boxes(sigma):
    ours = reference.gaussian_blur(unit(photo()), torch.tensor([sigma]))
    theirs = unit(pil(photo()).filter(ImageFilter.GaussianBlur(sigma)))
    inner = (..., slice(8, -8), slice(8, -8))
    close(ours[inner], theirs[inner], 2)


def same_distribution(ours, theirs):
    result = ks_2samp(np.asarray(ours), np.asarray(theirs))
    assert result.pvalue > 1e-3, result


@pytest.mark.parametrize("area", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (375, 500), (100, 30)])
def test_crops_are_drawn_as_torchvisions(area, height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    ratio = (3 / 4, 4 / 3)
    theirs = torch.tensor([T.RandomResizedCrop.get_params(image, area, ratio) for _ in range(DRAWS)]).float()
    ours = augment.crop_boxes(philox_uniform((DRAWS, 22), 1), height, width, area=area, ratio=ratio)
    for value in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        same_distribution(value(ours), value(theirs))


def test_jitter_is_drawn_as_torchvisions():
    torch.manual_seed(0)
    bounds = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]
    draws = [T.ColorJitter.get_params(*bounds) for _ in range(DRAWS)]
    factors, order = augment.jitter(philox_uniform((DRAWS, 8), 2), strength=0.4, hue=0.1)
    for kind in range(3):
        same_distribution(factors[:, kind], [d[1 + kind] for d in draws])
    same_distribution(factors[:, 3], [d[4] for d in draws])
    code = torch.tensor([64, 16, 4, 1])
    for orders in (order, torch.stack([d[0] for d in draws])):
        counts = torch.unique(orders @ code, return_counts=True)[1]
        assert len(counts) == 24 and ((counts - DRAWS / 24).abs() < 4.5 * math.sqrt(DRAWS / 24)).all()


def seen(views):
    """What a whole pipeline leaves in a view: means, spread, colour, detail, left against right."""
    mean, spread = views.mean((1, 2, 3)), views.std((1, 2, 3))
    colour = (views.max(1).values - views.min(1).values).mean((1, 2))
    detail = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
    side = views[..., :8].mean((1, 2, 3)) - views[..., 8:].mean((1, 2, 3))
    return {"mean": mean, "spread": spread, "colour": colour, "detail": detail, "side": side}


def test_whole_pipeline_is_distributed_as_torchvisions():
    torch.manual_seed(3)
    theirs = T.Compose(
        [
            T.RandomResizedCrop(16, (0.2, 1.0), antialias=True),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], 0.5),
            T.RandomHorizontalFlip(),
        ]
    )
    image = unit(photo(24, 24))[0]
    expected = seen(torch.stack([theirs(image) for _ in range(DRAWS)]))
    (ours,) = ssl(
        image.expand(DRAWS, -1, -1, -1), [KeyedRandom(7, torch.arange(DRAWS))], ViewsConfig(size=16, blur_kernel=9)
    )
    for name, values in seen(ours).items():
        same_distribution(values, expected[name])


BLURRED = ViewsConfig(size=5, jitter=0.2, blur_kernel=9, gray_p=0.5)
OFF = {"min_area": 1.0, "jitter": 0.0, "hue": 0.0, "gray_p": 0.0, "blur_p": 0.0}


@pytest.mark.parametrize(
    ("settings", "p"),
    [({}, 0.5), ({"jitter": 0.4}, 0.8), ({"gray_p": 0.2}, 0.2), ({"gray_p": 1.0}, 1.0), ({"blur_p": 0.5}, 0.5)],
    ids=["flip", "jitter", "gray", "always gray", "blur"],
)
def test_each_operation_happens_as_often_as_it_says(settings, p):
    """Square images with one unlike corner, all of which a crop of area 1 keeps; compared up to the mirror."""
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image[0, 0, 0] = 255
    x = unit(image)
    draw = KeyedRandom(5, torch.arange(DRAWS))
    (views,) = ssl(x.expand(DRAWS, -1, -1, -1), [draw], ViewsConfig(**{**OFF, **settings}))

    def same(y):
        return torch.isclose(views, y, atol=1e-4).flatten(1).all(1)

    changed = ~same(x) if not settings else ~(same(x) | same(x.flip(3)))
    # 7 % of the blurs have a sigma below 0.23, whose neighbours weigh less than 1e-4.
    if "blur_p" in settings:
        p *= 1 - 0.13 / 1.9
    assert abs(changed.float().mean() - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS) + 0.005 * ("blur_p" in settings)


def gentle(count=2, side=6):
    """float64 pixels away from clamps, with no two channels equal."""
    x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return (0.3 + 0.1 * x + 0.1 * torch.arange(3, dtype=torch.float64).view(1, 3, 1, 1)).requires_grad_()


@pytest.mark.parametrize(
    "operation",
    [
        lambda v: reference.resized_crop(v, torch.tensor([[0, 1, 5, 4], [2, 0, 3, 6.0]]), 4, torch.arange(2) < 1),
        lambda v: augment.resized_center_crop(v, shorter=5, size=4),
        lambda v: augment.shifted_crop(v, philox_uniform((2, 3), 0), padding=1),
        lambda v: jittered_by(v, philox_uniform((2, 8), 0), strength=0.2, hue=0.05),
        lambda v: reference.shift_hue(v, torch.tensor([0.05, -0.1])),
        lambda v: reference.gaussian_blur(v, torch.tensor([0.5, 1.5])),
        lambda v: reference.gaussian_blur(v, torch.tensor([0.5, 1.5]), kernel=5),
        reference.grayscale,
        lambda v: ssl(v, [KeyedRandom(0, torch.arange(2))], BLURRED)[0],
    ],
    ids=["crop", "centre", "shift", "jitter", "hue", "blur", "cut blur", "gray", "pipeline"],
)
def test_gradients_reach_the_pixels(operation):
    assert torch.autograd.gradcheck(operation, gentle())


@pytest.mark.parametrize("settings", [{}, {"size": 16}, {"blur_kernel": 9}], ids=str)
@pytest.mark.parametrize("name", ["crop_flip", "ssl", "test"])
def test_bfloat16_stays_near_float32_and_memory_order_does_not_matter(name, settings):
    pipeline = {"crop_flip": crop_flip, "ssl": ssl, "test": center_crop}[name]
    x = torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    draw, config = [Batch(tuple(f"k{i}" for i in range(64))).random(0)], ViewsConfig(**settings)
    (full,) = pipeline(x.bfloat16().float(), draw, config)
    (half,) = pipeline(x.bfloat16(), draw, config)
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), full, atol=3e-2, rtol=0)
    (last,) = pipeline(x.bfloat16().float().contiguous(memory_format=torch.channels_last), draw, config)
    torch.testing.assert_close(last, full, atol=1e-6, rtol=0)

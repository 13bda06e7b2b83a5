"""Defenses that change pixels alone: what all of them promise, and each against another library or a slow loop."""

import numpy as np
import pytest
import torch
from tiny import tiny_batch

from poisonshield.batch import Batch
from poisonshield.defenses.adverse_cleaner import AdverseCleaner, filter_bilateral, filter_guided
from poisonshield.defenses.base import Context
from poisonshield.defenses.bits import Bits
from poisonshield.defenses.gaussian import Gaussian
from poisonshield.defenses.jpeg import JPEG
from poisonshield.defenses.median import Median
from poisonshield.errors import ShapeError
from poisonshield.runs.classify import Classify

DEFENSES = Classify.defenses_from[0]

PURIFIERS = [n for n in DEFENSES.names() if DEFENSES.get(n).purifier]


def build(cls, **settings):
    return cls(cls.Config(**settings), Context(3, 4))


def picture(height=51, width=70, batch=2, seed=0):
    """1/f^1.6 noise about mid grey, on 8-bit levels."""
    draw = torch.Generator().manual_seed(seed)
    f = torch.sqrt(torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2)
    f[0, 0] = torch.inf
    noise = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(batch, 3, height, width, generator=draw)) * f**-1.6, s=(height, width)
    )
    x = 0.5 + 0.15 * noise / noise.std()
    return (x.clamp(0, 1) * 255).round() / 255


def of(x):
    return Batch(tuple(f"p{i}" for i in range(len(x))), x)


def hwc(x):
    return x.permute(1, 2, 0).contiguous().numpy()


def test_which_defenses_change_pixels_only():
    assert set(PURIFIERS) >= {"adverse_cleaner", "bits", "gaussian", "jpeg", "median"}
    assert not {"adversarial", "vespr"} & set(PURIFIERS)


@pytest.mark.parametrize("name", PURIFIERS)
def test_odd_sizes_stay_and_answers_are_8_bit_levels_of_that_picture_alone(name):
    x, defense = picture(), build(DEFENSES.get(name))
    before = x.clone()
    out = defense.before(of(x))
    assert out.x.shape == x.shape and out.x.dtype == torch.float32 and torch.equal(x, before)
    assert torch.equal((out.x * 255).round() / 255, out.x) and 0 <= out.x.min() and out.x.max() <= 1
    assert not torch.equal(out.x, x) and out.keys == ("p0", "p1")
    assert torch.equal(defense.before(of(x)).x, out.x)
    alone = torch.cat([defense.before(of(x[i : i + 1])).x for i in (1, 0)]).flip(0)
    assert torch.equal(alone, out.x)


@pytest.mark.parametrize("name", PURIFIERS)
@pytest.mark.parametrize("level", [0, 3, 128, 254, 255])
def test_grey_stays_to_one_level(name, level):
    """But for fewer bits, which by design move a level to the middle of its bin: at most half a bin."""
    x = torch.full((1, 3, 51, 70), level / 255)
    off = (build(DEFENSES.get(name)).before(of(x)).x - x).abs().max().item() * 255
    assert off <= (8.001 if name == "bits" else 1.001)


@pytest.mark.parametrize("name", PURIFIERS)
def test_twenty_passes_do_not_darken(name):
    x, defense = picture(48, 48, 1), build(DEFENSES.get(name), **({"passes": 2} if name == "adverse_cleaner" else {}))
    once = batch = defense.before(of(x))
    for _ in range(20):
        batch = defense.before(batch)
    assert abs(batch.x.mean() - once.x.mean()) * 255 < 0.5


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_gaussian_equals_opencv(sigma):
    cv2 = pytest.importorskip("cv2")
    x, defense = picture(), build(Gaussian, sigma=sigma)
    ours = defense.before(of(x)).x
    for a, b in zip(ours, x, strict=True):
        theirs = cv2.GaussianBlur(hwc(b), (defense.kernel,) * 2, sigma)
        assert np.abs(hwc(a) - theirs).max() * 255 <= 0.501


def test_gaussian_kernel_reaches_three_sigma_unless_given():
    assert build(Gaussian).kernel == 13 and build(Gaussian, sigma=1.0).kernel == 7
    assert build(Gaussian, sigma=1.4, kernel=5).kernel == 5
    with pytest.raises(ValueError, match="Give 5"):
        Gaussian.Config(kernel=4)
    with pytest.raises(ShapeError, match="too small"):
        build(Gaussian).before(tiny_batch(side=6))


@pytest.mark.parametrize("kernel", [3, 5])
def test_median_equals_opencv(kernel):
    cv2 = pytest.importorskip("cv2")
    x = torch.rand(2, 3, 51, 70, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    ours = build(Median, kernel=kernel).before(of(x)).x
    for a, b in zip(ours, x, strict=True):
        theirs = cv2.medianBlur((hwc(b) * 255).round().astype(np.uint8), kernel)
        assert np.array_equal((hwc(a) * 255).round().astype(np.uint8), theirs)


@pytest.mark.parametrize("bits", range(2, 8))
def test_bits_answer_with_the_middles_of_equal_bins(bits):
    ramp = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    out = (build(Bits, bits=bits).before(of(ramp)).x * 255).round().int()[0, 0].flatten()
    assert len(out.unique()) == 2**bits and torch.all(out.bincount()[out.unique()] == 256 // 2**bits)
    for middle in out.unique():
        inside = (out == middle).nonzero().float()
        assert middle - inside.mean() == 0.5  # between two levels, rounded up
    again = build(Bits, bits=bits).before(of(out.view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255)).x
    assert torch.equal((again * 255).round().int()[0, 0].flatten(), out)


def test_bilateral_equals_opencv_over_many_passes():
    cv2 = pytest.importorskip("cv2")
    x = picture(batch=1) * 255 + 4 * torch.randn(1, 3, 51, 70, generator=torch.Generator().manual_seed(1))
    theirs = hwc(x[0])
    for _ in range(64):
        x, theirs = filter_bilateral(x, sigma_color=8.0, sigma_space=8.0), cv2.bilateralFilter(theirs, 5, 8, 8)
    assert np.abs(hwc(x[0]) - theirs).max() < 0.1  # OpenCV reads exp from a table


def slow_guided(guide, x, radius, eps):
    """Sums over each square in float64; pixels beyond an edge are those before it, the edge pixel included."""
    channels, height, width = guide.shape
    mirror = lambda i, n: -i - 1 if i < 0 else 2 * n - i - 1 if i >= n else i
    window = lambda i, j: [
        (mirror(i + a, height), mirror(j + b, width))
        for a in range(-radius, radius + 1)
        for b in range(-radius, radius + 1)
    ]
    slopes, offsets = np.zeros((height, width, channels, len(x))), np.zeros((height, width, len(x)))
    for i in range(height):
        for j in range(width):
            g = np.array([guide[:, a, b] for a, b in window(i, j)])
            p = np.array([x[:, a, b] for a, b in window(i, j)])
            cov, both = np.cov(g.T, bias=True).reshape(channels, channels), (g - g.mean(0)).T @ (p - p.mean(0)) / len(g)
            slopes[i, j] = np.linalg.solve(cov + eps * np.eye(channels), both)
            offsets[i, j] = p.mean(0) - g.mean(0) @ slopes[i, j]
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            near = window(i, j)
            slope = np.mean([slopes[a, b] for a, b in near], axis=0)
            out[:, i, j] = guide[:, i, j] @ slope + np.mean([offsets[a, b] for a, b in near], axis=0)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_guided_filter_equals_sums_over_squares(channels):
    draw = torch.Generator().manual_seed(0)
    guide, x = (torch.rand(1, c, 8, 8, generator=draw, dtype=torch.float64) * 255 for c in (channels, 3))
    wanted = slow_guided(guide[0].numpy(), x[0].numpy(), 2, 16.0)
    assert np.abs(filter_guided(guide, x, radius=2, eps=16.0)[0].numpy() - wanted).max() < 1e-9
    single = filter_guided(guide.float(), x.float(), radius=2, eps=16.0)[0].numpy()
    assert np.abs(single - wanted).max() < 1e-2  # of 255 levels


def test_guide_that_is_the_picture_returns_it_as_eps_vanishes():
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 255
    torch.testing.assert_close(filter_guided(x, x, radius=2, eps=1e-6), x, rtol=0, atol=1e-5)


def test_guided_passes_are_calls_in_a_row():
    draw = torch.Generator().manual_seed(0)
    guide, x = (torch.rand(2, 3, 9, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    once = filter_guided(guide, filter_guided(guide, x, radius=2, eps=0.1), radius=2, eps=0.1)
    torch.testing.assert_close(filter_guided(guide, x, radius=2, eps=0.1, passes=2), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 8])
def test_cleaner_removes_noise_and_its_guide_brings_part_of_it_back(size):
    noise = (torch.rand(1, 3, 51, 70, generator=torch.Generator().manual_seed(2)) < 0.5) * 2.0 - 1
    share = lambda x, **settings: (
        ((build(AdverseCleaner, **settings).before(of(x + noise * size / 255)).x - x) * noise * 255 / size)
        .mean()
        .item()
    )
    textured = picture(batch=1).clamp(0.1, 0.9)
    assert share(textured, guided_passes=0) < share(textured) < 0.85
    if size == 2:  # what is weaker than sqrt(eps) = 4 levels goes, where the picture itself is flat
        assert share(torch.full_like(noise, 0.5)) < 0.1
    with pytest.raises(ShapeError, match="too small"):
        build(AdverseCleaner).before(tiny_batch(side=3))


def survival(defense, cell, side=256, size=8 / 255):
    """The share of a sign pattern of `cell` pixels that a purifier leaves."""
    x, draw = picture(side, side, 1), torch.Generator().manual_seed(cell)
    signs = (torch.rand(1, 3, side // cell, side // cell, generator=draw) < 0.5) * 2.0 - 1
    delta = signs.repeat_interleave(cell, 2).repeat_interleave(cell, 3) * size
    change = defense.before(of((x + delta).clamp(0, 1))).x - defense.before(of(x)).x
    return ((change * delta).sum() / delta.square().sum()).item()


def test_jpeg_at_25_removes_white_noise_and_leaves_a_pattern_of_16_pixels():
    defense = build(JPEG, quality=25)
    assert survival(defense, 1) < 0.2 and survival(defense, 16) > 0.9


def test_jpeg_of_a_jpeg_changes_hardly_a_pixel():
    once = build(JPEG, quality=25).before(of(picture(256, 256)))
    assert (build(JPEG, quality=25).before(once).x != once.x).float().mean() < 0.01

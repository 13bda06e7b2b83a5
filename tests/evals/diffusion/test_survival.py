"""What is left of a poison: shares by frequency against slow sums, and a picture's numbers against NumPy's."""

import math

import numpy as np
import pytest
import torch

from poisonshield.errors import ShapeError
from poisonshield.evals.diffusion.parts.survival import Purified, edges_of, measure, survival
from poisonshield.ops import jpeg

EDGES = [0.0, 0.125, 0.25, 0.375]


def natural(seed, size=(48, 64)):
    """uint8 [3, H, W] with an amplitude that falls as 1/f^1.6."""
    draw = torch.Generator().manual_seed(seed)
    f = torch.sqrt(torch.fft.fftfreq(size[0])[:, None] ** 2 + torch.fft.rfftfreq(size[1]) ** 2)
    f[0, 0] = math.inf
    x = torch.fft.irfft2(torch.fft.rfft2(torch.randn(3, *size, generator=draw)) * f**-1.6, s=size)
    return (128 + 40 * x / x.std()).clamp(20, 235).round().to(torch.uint8)


def with_cells(x, side, seed=0, levels=8):
    """x with squares of `side` pixels moved up or down by `levels`."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (3, -(-x.shape[1] // side), -(-x.shape[2] // side)), generator=draw) * 2 - 1
    signs = signs.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, : x.shape[1], : x.shape[2]]
    return (x.int() + levels * signs).clamp(0, 255).to(torch.uint8)


def compressed(x, quality):
    return jpeg(x[None], quality, mode="exact")[0]


def test_shares_are_those_of_a_slow_fourier_sum():
    clean, size = natural(0, (9, 11)), (9, 11)
    poisoned = with_cells(clean, 1)
    purified, purified_clean = compressed(poisoned, 50), compressed(clean, 50)
    share, bands = survival(clean, poisoned, purified, purified_clean, edges=EDGES)
    d = poisoned.numpy().astype(float) - clean.numpy()
    r = purified.numpy().astype(float) - purified_clean.numpy()
    cross, own = np.zeros(4), np.zeros(4)
    y, x = np.mgrid[: size[0], : size[1]]
    for u in range(size[0]):
        for v in range(size[1]):
            wave = np.exp(-2j * np.pi * (u * y / size[0] + v * x / size[1]))
            fu, fv = (k / n if k < n / 2 else k / n - 1 for k, n in zip((u, v), size, strict=True))
            band = min(3, int(math.hypot(fu, fv) / 0.125))
            for c in range(3):
                a, b = (r[c] * wave).sum(), (d[c] * wave).sum()
                cross[band] += (a * b.conjugate()).real
                own[band] += abs(b) ** 2
    assert np.allclose([b.share for b in bands], cross / own, rtol=1e-9)
    assert np.allclose([b.energy for b in bands], own / own.sum(), rtol=1e-9)
    assert share == pytest.approx((r * d).sum() / (d * d).sum(), rel=1e-9)
    assert share == pytest.approx(sum(b.energy * b.share for b in bands), rel=1e-9)


def test_nothing_done_leaves_all_and_a_clean_picture_leaves_nothing():
    clean = natural(0)
    poisoned = with_cells(clean, 2)
    assert survival(clean, poisoned, poisoned, clean, edges=EDGES)[0] == pytest.approx(1.0)
    assert survival(clean, poisoned, clean, clean, edges=EDGES)[0] == 0.0
    share, bands = survival(clean, clean, clean, clean, edges=EDGES)
    assert share is None and all(b.share is None and b.energy == 0 for b in bands)


@pytest.mark.parametrize(("quality", "fine", "coarse"), [(25, 0.2, 0.9), (50, 0.2, 0.9)])
def test_compression_takes_high_frequencies_and_keeps_large_cells(quality, fine, coarse):
    clean = natural(1, (128, 128))
    shares = {}
    for side in (1, 16):
        poisoned = with_cells(clean, side)
        shares[side], bands = survival(
            clean, poisoned, compressed(poisoned, quality), compressed(clean, quality), edges=EDGES
        )
        if side == 1:
            assert bands[0].share > bands[2].share
    print(f"quality {quality}: {shares}")
    assert shares[1] < fine and shares[16] > coarse


def test_one_picture_is_measured_as_numpy_measures_it():
    clean = natural(3, (32, 40))
    poisoned = with_cells(clean, 2, levels=6)
    pure = {"purified": compressed(poisoned, 75), "purified_clean": compressed(clean, 75)}
    row = measure("a", clean=clean, poisoned=poisoned, edges=EDGES, **pure)
    a, b, c, d = (x.numpy().astype(float) for x in (clean, poisoned, *pure.values()))
    assert row.survival == pytest.approx(((c - d) * (b - a)).sum() / ((b - a) ** 2).sum())
    assert row.max_levels == np.abs(b - a).max() == 6 and row.size == (32, 40)
    for found, x in ((row.psnr_poisoned, b), (row.psnr_purified, c), (row.psnr_cost, d)):
        assert found == pytest.approx(10 * np.log10(255**2 / ((x - a) ** 2).mean()))


def test_means_leave_out_what_a_picture_does_not_have():
    clean, still = natural(3), natural(4)
    rows = [
        measure("a", clean=clean, poisoned=with_cells(clean, 1), purified=clean, purified_clean=clean, edges=EDGES),
        measure("b", clean=still, poisoned=still, purified=still, purified_clean=still, edges=EDGES),
    ]
    mean = Purified.of("nothing", {}, rows)
    assert rows[1].survival is None and rows[1].psnr_poisoned is None and rows[1].max_levels == 0
    assert mean.survival == 0.0 and mean.psnr_poisoned == rows[0].psnr_poisoned and mean.psnr_cost is None
    assert mean.survival_by_band == tuple(b.share for b in rows[0].bands)


def test_pictures_of_another_size_or_kind_are_refused():
    a, small = natural(0), natural(0, (8, 8))
    with pytest.raises(ShapeError, match="uint8 of one size"):
        survival(a, a, small, a, edges=EDGES)
    with pytest.raises(ShapeError, match="float"):
        survival(a, a, a, a.float(), edges=EDGES)


def test_bands_begin_at_equal_distances():
    assert edges_of(4) == (0.0, 0.125, 0.25, 0.375)

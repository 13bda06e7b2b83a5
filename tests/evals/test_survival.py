"""What is left of a poison: shares by frequency against slow sums, and a report that the files alone give again."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from poisonshield.errors import DataError, ShapeError
from poisonshield.evals.survival import FORMAT, Report, load_report, psnr, save_report, survey, survival
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
    assert survival(clean, poisoned, poisoned, edges=EDGES)[0] == pytest.approx(1.0)
    assert survival(clean, poisoned, clean, edges=EDGES)[0] == 0.0
    share, bands = survival(clean, clean, clean, edges=EDGES)
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


def write(folder, pictures):
    folder.mkdir()
    for key, x in pictures.items():
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{key}.png")
    return folder


def test_poison_purify_and_remeasure_is_reproduced_from_files_alone(tmp_path):
    from poisonshield.poisons.diffusion.advdm import AdvDM

    clean = {f"k{i}": natural(i, (32, 40)) for i in range(2)}
    poisoned = AdvDM(AdvDM.Config(steps=3), model=tiny_model()).perturb(clean)
    stages = {"clean": clean, "poisoned": poisoned}
    stages |= {f"pure_{n}": {k: compressed(x, 75) for k, x in stages[n].items()} for n in ("clean", "poisoned")}
    folders = {name: write(tmp_path / name, made) for name, made in stages.items()}
    of_folders = [folders[n] for n in ("clean", "poisoned", "pure_poisoned", "pure_clean")]
    save_report(survey(*of_folders, bands=4), tmp_path / "report.json")
    report = load_report(tmp_path / "report.json")
    assert report == survey(*of_folders, bands=4) and report.format == FORMAT
    # From the files by NumPy alone.
    for row in report.pictures:
        a, b, c, d = (np.array(Image.open(f / f"{row.key}.png")).astype(float) for f in of_folders)
        assert row.survival == pytest.approx(((c - d) * (b - a)).sum() / ((b - a) ** 2).sum())
        assert row.max_levels == np.abs(b - a).max() <= 8
        assert row.psnr_poisoned == pytest.approx(10 * np.log10(255**2 / ((b - a) ** 2).mean()))
        assert row.psnr_purified == pytest.approx(10 * np.log10(255**2 / ((c - a) ** 2).mean()))
        assert row.psnr_cost == pytest.approx(10 * np.log10(255**2 / ((d - a) ** 2).mean()))
    assert report.survival == pytest.approx(np.mean([row.survival for row in report.pictures]))
    schema = Report.model_json_schema()
    assert set(json.loads((tmp_path / "report.json").read_text())) == set(schema["properties"])
    without = survey(*of_folders[:3], bands=4)
    print(
        f"survival of advdm after JPEG 75: {report.survival:.3f}; without purified clean pictures {without.survival:.3f}"
    )
    assert not without.purified_clean and without.pictures[0].psnr_cost is None


def test_equal_pictures_have_no_psnr():
    x = natural(0)
    assert psnr(x, x) is None


def test_folders_that_do_not_fit_are_refused(tmp_path):
    clean = {"a": natural(0), "b": natural(1)}
    full, half = write(tmp_path / "full", clean), write(tmp_path / "half", {"a": clean["a"]})
    with pytest.raises(DataError, match="b is in .* and not in .*half"):
        survey(full, full, half)
    with pytest.raises(DataError, match="no pictures"):
        survey(full, write(tmp_path / "none", {}), full)
    small = write(tmp_path / "small", {"a": natural(0, (8, 8))})
    with pytest.raises(ShapeError, match="must keep the size"):
        survey(half, half, small)
    (tmp_path / "bad.json").write_text('{"format": "x"}')
    with pytest.raises(DataError, match="no report"):
        load_report(Path(tmp_path / "bad.json"))

"""Picture quality beside scikit-image and numpy, from arrays and from files, and without any network."""

import builtins
import socket

import numpy
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from poisonshield import world
from poisonshield.errors import ShapeError
from poisonshield.evals.diffusion.brisque import brisque, say_missing
from poisonshield.evals.diffusion.high_frequency import high_frequency
from poisonshield.evals.diffusion.parts.image_quality import difference, psnr, ssim
from poisonshield.ops.jpeg import jpeg


def pictures(count=3):
    return torch.stack([world.render(i, seed=4).x for i in range(count)])


def noisy(x, amount=0.05):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


@pytest.mark.parametrize("shape", [(64, 64), (11, 30)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape):
    x = pictures()[:, :, : shape[0], : shape[1]]
    y = noisy(x)
    for i in range(len(x)):
        a, b = (v[i].permute(1, 2, 0).double().numpy() for v in (x, y))
        expected = structural_similarity(
            a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(x, y)[i]) == pytest.approx(expected, abs=1e-6)
        assert float(psnr(x, y)[i]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-4)


def test_equal_pictures_are_equal():
    x = pictures()
    assert torch.isinf(psnr(x, x)).all()
    told = difference(x, x)
    assert told["psnr"] is None and told["ssim"] == pytest.approx(1.0) and told["max_levels"] == 0


def test_plus_minus_eight_levels_everywhere_is_30_decibels():
    x = torch.full((1, 3, 16, 16), 100 / 255)
    signs = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    told = difference(x + 8 / 255 * signs, x)
    assert told["psnr"] == pytest.approx(30.07, abs=0.01)
    assert told["max_levels"] == 8 and told["mean_levels"] == pytest.approx(8)


def test_high_frequency_share_is_that_of_a_full_spectrum():
    for size in ((16, 16), (15, 18), (9, 7)):
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
        for i in range(2):
            power = sum(numpy.abs(numpy.fft.fft2(c - c.mean())) ** 2 for c in x[i].double().numpy())
            fy, fx = numpy.fft.fftfreq(size[0])[:, None], numpy.fft.fftfreq(size[1])[None]
            expected = power[numpy.sqrt(fy**2 + fx**2) > 0.125].sum() / power.sum()
            assert float(high_frequency(x)[i]) == pytest.approx(expected, abs=1e-6)
    assert high_frequency(torch.full((1, 3, 8, 8), 0.3)).tolist() == [0.0]


def test_noise_raises_and_blur_lowers_the_high_frequency_share():
    x = pictures()
    soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert float(high_frequency(soft).mean()) < float(high_frequency(x).mean()) < float(high_frequency(noisy(x)).mean())


def test_numbers_come_back_from_files_alone(tmp_path):
    """Poisoned by noise, purified by JPEG, written as PNG, read and measured again."""
    x = pictures()
    sets = {"clean": x, "poisoned": noisy(x, 0.03), "purified": jpeg(noisy(x, 0.03), quality=75)}
    for name, values in sets.items():
        for i, v in enumerate(values):
            levels = (v.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(levels).save(tmp_path / f"{name}-{i}.png")

    def read(name):
        files = [numpy.asarray(Image.open(tmp_path / f"{name}-{i}.png")).copy() for i in range(3)]
        return torch.stack([torch.from_numpy(f).permute(2, 0, 1).float() / 255 for f in files])

    for name in ("poisoned", "purified"):
        assert difference(read(name), read("clean")) == difference(sets[name], x)


def test_brisque_is_finite_without_a_network_and_ranks_noise_last(monkeypatch):
    pytest.importorskip("brisque", reason="needs the extra brisque")

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    x = torch.nn.functional.interpolate(pictures(2), scale_factor=3, mode="bicubic").clamp(0, 1)
    told, worse = brisque(x), brisque(noisy(x, 0.2))
    assert told["status"] == "ok" and told["pictures"] == 2
    assert numpy.isfinite(told["value"]) and worse["value"] > told["value"]
    assert brisque(torch.full((1, 3, 64, 64), 0.5)) == {"status": "ok", "value": None, "pictures": 0}


def test_without_its_package_brisque_is_unavailable_in_words(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "brisque":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert brisque(pictures(1)) == {"status": "unavailable", "needs": "pip install '.[brisque]'"}


def test_shapes_that_do_not_fit_are_refused():
    x = pictures(2)
    with pytest.raises(ShapeError, match="two equal shapes"):
        psnr(x, x[:1])
    with pytest.raises(ShapeError, match="window of 11"):
        ssim(x[..., :10], x[..., :10])
    with pytest.raises(ShapeError, match="at least one"):
        difference(x[:0], x[:0])


def test_what_is_not_measured_is_said_once(caplog):
    say_missing.cache_clear()
    for _ in range(3):
        say_missing("pip install '.[brisque]'")
    assert caplog.text.count("BRISQUE is not measured: pip install '.[brisque]'") == 1

"""Exact mode against real codecs: no pixel differs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from poisonshield.ops import jpeg, jpeg_coefficients, jpeg_tables, use_backend

QUALITIES = (1, 2, 5, 10, 25, 49, 50, 51, 75, 90, 95, 99, 100)
SIZES = (
    (1, 1), (2, 2), (3, 5), (4, 2), (5, 6), (7, 9), (8, 8), (15, 31), (16, 16), (17, 16), (33, 17), (97, 83),
    (130, 129), (224, 224),
)  # fmt: skip
PILLOW = {"444": 0, "420": 2}

pytestmark = pytest.mark.skipif(
    not features.check("libjpeg_turbo"), reason=f"Pillow's codec is {features.version('jpg')}, not libjpeg-turbo"
)


@pytest.fixture(scope="module", params=["auto", "reference"], autouse=True)
def backend(request):
    """What a CPU takes by itself, which is compiled where the library is built; and the oracle of all backends."""
    with use_backend(request.param):
        yield


def encoded(pixels, quality, subsampling):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=PILLOW[subsampling])
    return buffer


def by_pillow(pixels, quality, subsampling):
    return np.asarray(Image.open(encoded(pixels, quality, subsampling)).convert("RGB"))


def by_us(pixels, quality, subsampling):
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return jpeg(x, quality, subsampling=subsampling, mode="exact")[0].permute(1, 2, 0).numpy()


def made(kind, h, w):
    rng = np.random.default_rng(h * 1000 + w)
    if kind == "binary noise":
        return (rng.integers(0, 2, (h, w, 3)) * 255).astype(np.uint8)
    if kind == "noise":
        return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    if kind == "gradient":
        ramp = np.add.outer(np.arange(h) * 2, np.arange(w) * 3)
        return np.stack([ramp % 256, (255 - ramp) % 256, (ramp * 2) % 256], -1).astype(np.uint8)
    return np.full((h, w, 3), {"black": 0, "white": 255}[kind], np.uint8)


def differing(pixels, qualities, subsampling):
    return sum(
        int((by_us(pixels, q, subsampling) != by_pillow(pixels, q, subsampling)).any(-1).sum()) for q in qualities
    )


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize("kind", ["binary noise", "noise", "gradient", "black", "white"])
def test_made_images_equal_pillow(kind, subsampling):
    assert [s for s in SIZES if differing(made(kind, *s), QUALITIES, subsampling)] == []


@pytest.fixture(scope="module")
def photos(dreambooth_folder):
    files = sorted(dreambooth_folder.glob("*/*.jpg"))[::27][:6]
    assert len(files) == 6
    return [np.asarray(Image.open(f).convert("RGB")) for f in files]


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_photographs_equal_pillow(photos, subsampling):
    for photo in photos:
        for i, (h, w) in enumerate(SIZES):
            crop = photo[11 * i : 11 * i + h, 7 * i : 7 * i + w]
            assert differing(np.ascontiguousarray(crop), QUALITIES, subsampling) == 0, (h, w)


def test_a_whole_photograph_of_each_subject_equals_pillow(dreambooth_folder):
    files = sorted(dreambooth_folder.glob("*/00.jpg"))
    assert len(files) == 30
    assert sum(differing(np.asarray(Image.open(f).convert("RGB")), (5, 75), "420") for f in files) == 0


def test_cifar10_images_equal_pillow(cifar10_folder):
    import tarfile

    shard = sorted(Path(cifar10_folder).rglob("*.tar.gz"))[0]
    with tarfile.open(shard) as tar:
        names = [m for m in tar if m.name.endswith((".jpg", ".jpeg"))][:50]
        images = [np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in names]
    assert len(images) == 50
    assert sum(differing(i, QUALITIES, s) for i in images for s in PILLOW) == 0


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_equals_torchvision(quality):
    for size in SIZES:
        x = torch.from_numpy(made("noise", *size)).permute(2, 0, 1).contiguous()
        theirs = decode_jpeg(encode_jpeg(x, quality=quality), mode=ImageReadMode.RGB)
        assert torch.equal(jpeg(x[None], quality, mode="exact")[0], theirs), size


def test_float_pixels_equal_uint8_pixels():
    pixels = torch.from_numpy(made("noise", 33, 17)).permute(2, 0, 1)[None]
    for dtype in (torch.float32, torch.float64):
        out = jpeg(pixels.to(dtype) / 255, 60, mode="exact")
        assert torch.equal(out, jpeg(pixels, 60, mode="exact").to(dtype) / 255)


def test_nan_is_read_as_zero():
    x = torch.full((1, 3, 8, 8), 0.5)
    y = x.clone()
    x[0, 0, 3, 3], y[0, 0, 3, 3] = torch.nan, 0
    assert torch.equal(jpeg(x, 50, mode="exact"), jpeg(y, 50, mode="exact"))


def test_tables_are_those_in_the_file():
    for quality in range(1, 101):
        stored = Image.open(encoded(made("noise", 8, 8), quality, "444")).quantization
        assert jpeg_tables(quality)[0].flatten(1).tolist() == [stored[0], stored[1]], quality


def test_luminance_table_is_not_transposed():
    luma = jpeg_tables(50)[0, 0]
    assert (luma[0, 1], luma[1, 0]) == (11, 12)


def test_quality_zero_counts_as_one():
    assert torch.equal(jpeg_tables(0), jpeg_tables(1))


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_coefficients_decode_to_the_same_pixels(subsampling):
    """The coefficients of a grey image are enough to rebuild it by the textbook inverse, up to the integer rounding."""
    grey = np.repeat(made("noise", 32, 48)[..., :1], 3, -1)
    x = torch.from_numpy(grey).permute(2, 0, 1)[None]
    y, cb, cr = jpeg_coefficients(x, 90, subsampling=subsampling)
    assert y.dtype == torch.int32 and y.shape == (1, 4, 6, 8, 8)
    assert not cb.any() and not cr.any()
    from slow_jpeg import basis

    c, table = basis(), jpeg_tables(90)[0, 0].double().numpy()
    blocks = c.T @ (y[0].double().numpy() * table) @ c + 128  # [rows, columns, 8, 8]
    rebuilt = np.clip(blocks, 0, 255).transpose(0, 2, 1, 3).reshape(32, 48)
    assert np.abs(rebuilt - by_pillow(grey, 90, subsampling)[..., 0]).max() <= 1.0


def test_backward_is_that_of_the_smooth_pipeline():
    x = torch.rand(2, 3, 17, 21, dtype=torch.float64)
    w = torch.rand_like(x)
    grads = []
    for mode in ("exact", "smooth"):
        leaf = x.clone().requires_grad_()
        (jpeg(leaf, 60, mode=mode) * w).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)

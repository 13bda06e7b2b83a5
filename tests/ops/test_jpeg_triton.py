"""The Triton kernels of JPEG in Triton's interpreter, against the plain reference and libjpeg-turbo."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from poisonshield.errors import BackendError
from poisonshield.ops import jpeg
from poisonshield.ops.jpeg import reference
from poisonshield.ops.jpeg.tables import scaled_tables

pytestmark = pytest.mark.usefixtures("interpreted")

FORMS = [("420", "fancy"), ("420", "box"), ("444", "fancy")]
SIZES = [(1, 1), (5, 3), (16, 16), (17, 21), (18, 34)]


def made(*shape, seed=0, low=0.1, high=0.9):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * (high - low) + low).float()


def near_ties(x, quality, subsampling):
    """How many coefficients lie so near to a tie that float32 may round them either way."""
    affine = torch.tensor([[255.0] * 3, [0.0] * 3], dtype=torch.float64)
    tables = scaled_tables(quality.double())
    units = reference.Pipeline(x.double(), tables, affine, reference.JpegSettings(subsampling)).u
    return sum(int(((u.abs() % 1 - 0.5).abs() < 1e-4).sum()) for u in units)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("rounding", ["none", "poly", "ste", "poly_ste", "fourier"])
def test_smooth_forward_and_backward_equal_the_reference(form, rounding):
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": rounding, "fourier_terms": 3}
    compared = 0
    for seed, size in enumerate(SIZES):
        x, quality = made(2, 3, *size, seed=seed), torch.tensor([20.0, 70.0])
        if rounding != "none" and near_ties(x, quality, form[0]):
            continue
        w, results = made(2, 3, *size, seed=9), []
        for backend in ("triton", "reference"):
            leaf = x.clone().requires_grad_()
            out = jpeg(leaf, quality, clamp_grad=0.25, backend=backend, **settings)
            (out * w).sum().backward()
            results.append((out.detach(), leaf.grad))
        (out, grad), (expected, expected_grad) = results
        assert (out - expected).abs().max() < 2e-4
        # The series' slope changes by up to 80 per unit of u, which multiplies float32's error in u.
        tolerance = 1e-3 if rounding == "fourier" else 1e-4
        assert (grad - expected_grad).abs().max() <= tolerance * expected_grad.abs().max() + 2e-5
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_integer_planes_equal_the_reference_but_next_to_their_ties(form):
    x = made(2, 3, 18, 34)
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": "none", "integer_planes": True}
    difference = (jpeg(x, 60, backend="triton", **settings) - jpeg(x, 60, **settings)).abs()
    assert (difference > 1e-6).float().mean() < 0.02 and difference.max() < 3 / 255


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_gradients_where_clamps_cut(form):
    x = made(1, 3, 17, 21, low=-0.3, high=1.3)
    grads = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        jpeg(
            leaf, 60, subsampling=form[0], upsample=form[1], rounding="none", backend=backend
        ).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()


def by_pillow(pixels, quality, subsampling):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling={"444": 0, "420": 2}[subsampling])
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("subsampling", ["420", "444"])
@pytest.mark.parametrize("quality", [1, 10, 50, 75, 95, 100])
def test_exact_mode_equals_libjpeg_turbo_to_the_bit(subsampling, quality):
    for h, w in SIZES:
        rng = np.random.default_rng(h * 100 + w)
        for pixels in (
            rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            (rng.integers(0, 2, (h, w, 3)) * 255).astype(np.uint8),
        ):
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            out = jpeg(x, quality, subsampling=subsampling, mode="exact", backend="triton")
            assert np.array_equal(out[0].permute(1, 2, 0).numpy(), by_pillow(pixels, quality, subsampling)), (h, w)
            floats = jpeg(x / 255, quality, subsampling=subsampling, mode="exact", backend="triton")
            assert torch.equal(floats, out / 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_layouts(dtype):
    x = made(2, 3, 17, 21).to(dtype)
    plain = jpeg(x, 60, rounding="none", backend="triton")
    assert plain.dtype == dtype
    assert (plain.float() - jpeg(x, 60, rounding="none").float()).abs().max() <= torch.finfo(dtype).eps
    last = jpeg(x.to(memory_format=torch.channels_last), 60, rounding="none", backend="triton")
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, plain)
    assert torch.equal(jpeg(x[:1].expand(2, -1, -1, -1), 60, rounding="none", backend="triton")[1], plain[0])


def test_a_nan_stays_in_its_neighbourhood():
    x = made(1, 3, 64, 48)
    clean = jpeg(x, 50, backend="triton")
    x[0, 1, 20, 20] = torch.nan
    out = jpeg(x, 50, backend="triton")
    spread = out.isnan().any(1)[0].nonzero()
    assert spread.min(0).values.tolist() >= [15, 15] and spread.max(0).values.tolist() <= [32, 32]
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_what_is_not_covered_is_refused_with_the_reason():
    with pytest.raises(BackendError, match="float64 is for the reference"):
        jpeg(made(1, 3, 8, 8).double(), 50, backend="triton")
    quality = torch.tensor([50.0], requires_grad=True)
    out = jpeg(made(1, 3, 8, 8), quality, backend="triton")
    with pytest.raises(BackendError, match="gradients of tables"):
        out.sum().backward()

"""The compiled JPEG of the CPU, against a slow float64 model, the reference's gradients and libjpeg-turbo."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, features
from slow_jpeg import slow_jpeg

from poisonshield.errors import BackendError
from poisonshield.ops import dispatch, jpeg, jpeg_tables, native, stats
from poisonshield.ops.jpeg import cpu_kernels
from poisonshield.ops.jpeg.reference import JpegSettings, Pipeline, examples
from poisonshield.ops.jpeg.tables import scaled_tables

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FORMS = [("420", "fancy"), ("420", "box"), ("444", "fancy")]
SIZES = [(1, 1), (5, 3), (2, 18), (16, 16), (17, 21), (33, 18), (8, 5)]
ROUNDINGS = ["none", "poly", "ste", "poly_ste", "hard"]


def made(*shape, seed=0, low=0.1, high=0.9):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * (high - low) + low).float()


def near_ties(x, quality, subsampling):
    """How many coefficients lie so near to a tie that float32 may round them either way."""
    affine = torch.tensor([[255.0] * 3, [0.0] * 3], dtype=torch.float64)
    units = Pipeline(x.double(), scaled_tables(quality.double()), affine, JpegSettings(subsampling)).u
    return sum(int(((u.abs() % 1 - 0.5).abs() < 1e-4).sum()) for u in units)


def cases(form, rounding, least):
    """(x [1, 3, h, w], quality [1]) of several sizes without a coefficient next to a tie; at least so many."""
    found = 0
    for seed, size in enumerate(SIZES):
        x, quality = made(1, 3, *size, seed=seed), torch.tensor([30.0 if seed % 2 else 85.0])
        if rounding == "none" or not near_ties(x, quality, form[0]):
            found += 1
            yield x, quality
    assert found >= least


def results(x, quality, w, backend, **settings):
    """The picture, and the gradients of its product with w for pixels and quality."""
    x, quality = x.clone().requires_grad_(), quality.clone().requires_grad_()
    out = jpeg(x, quality, backend=backend, **settings)
    (out * w).sum().backward()
    return out.detach(), x.grad, quality.grad


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_equals_the_slow_model(form, rounding):
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": rounding}
    for x, quality in cases(form, rounding, 4):
        tables = jpeg_tables(quality)[0].double().numpy()
        expected = torch.from_numpy(slow_jpeg(x[0].numpy(), tables, terms=1, **settings))
        assert (jpeg(x, quality, backend="cpu", **settings)[0] - expected).abs().max() < 2e-4, x.shape


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("rounding", ROUNDINGS[:-1])
def test_gradients_of_pixels_and_quality_equal_the_reference_in_float64(form, rounding):
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": rounding, "clamp_grad": 0.25}
    for x, quality in cases(form, rounding, 4):
        w = made(*x.shape, seed=9)
        _, dx, dq = results(x, quality, w, "cpu", **settings)
        _, expected, expected_dq = results(x.double(), quality.double(), w.double(), "reference", **settings)
        assert (dx - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6, x.shape
        assert (dq - expected_dq).abs() <= 2e-3 * expected_dq.abs() + 1e-5, x.shape


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("clamp_grad", [0.0, 0.5])
def test_gradients_where_clamps_cut(form, clamp_grad):
    x, w, quality = made(2, 3, 37, 21, low=-0.4, high=1.4), made(2, 3, 37, 21, seed=1), torch.tensor([60.0, 90.0])
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": "none", "clamp_grad": clamp_grad}
    out, dx, _ = results(x, quality, w, "cpu", **settings)
    expected, expected_dx, _ = results(x.double(), quality.double(), w.double(), "reference", **settings)
    assert (out - expected).abs().max() < 1e-5
    # A value next to a clamp's edge may fall on either side of it in float32.
    apart = (dx - expected_dx).abs() > 1e-4 * expected_dx.abs().max()
    assert apart.float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_linear_version_and_its_adjoint(form):
    """<J v, w> = <v, J' w>, with nothing from the reference."""
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": "none", "backend": "cpu"}
    for size in SIZES:
        x, v, w = (made(1, 3, *size, seed=s, low=-1, high=1) for s in range(3))
        x = x * 0.05 + 0.5
        jv = (jpeg(x + 0.1 * v, 60, **settings).double() - jpeg(x - 0.1 * v, 60, **settings).double()) / 0.2
        leaf = x.clone().requires_grad_()
        (jtw,) = torch.autograd.grad((jpeg(leaf, 60, **settings) * w).sum(), leaf)
        assert abs((jv * w).sum() - (v.double() * jtw).sum()) < 1e-4 * max(1, w.numel() ** 0.5), size


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_integer_planes_equal_the_reference_but_next_to_their_ties(form):
    x = made(2, 3, 18, 34)
    settings = {"subsampling": form[0], "upsample": form[1], "rounding": "none", "integer_planes": True}
    difference = (jpeg(x, 60, backend="cpu", **settings) - jpeg(x, 60, backend="reference", **settings)).abs()
    assert (difference > 1e-6).float().mean() < 0.02 and difference.max() < 3 / 255


def by_pillow(pixels, quality, subsampling):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling={"444": 0, "420": 2}[subsampling])
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.skipif(not features.check("libjpeg_turbo"), reason="Pillow's codec is not libjpeg-turbo")
@pytest.mark.parametrize("subsampling", ["420", "444"])
@pytest.mark.parametrize("quality", [1, 2, 10, 49, 50, 75, 95, 99, 100])
def test_exact_mode_equals_libjpeg_turbo_to_the_bit(subsampling, quality):
    for h, w in [*SIZES, (2, 2), (3, 4), (130, 129), (97, 83)]:
        rng = np.random.default_rng(h * 100 + w)
        for pixels in (
            rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            (rng.integers(0, 2, (h, w, 3)) * 255).astype(np.uint8),
            np.add.outer(np.arange(h) * 2, np.arange(w * 3)).reshape(h, w, 3).astype(np.uint8),
        ):
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            out = jpeg(x, quality, subsampling=subsampling, mode="exact", backend="cpu")
            assert np.array_equal(out[0].permute(1, 2, 0).numpy(), by_pillow(pixels, quality, subsampling)), (h, w)
            floats = jpeg(x / 255, quality, subsampling=subsampling, mode="exact", backend="cpu")
            assert torch.equal(floats, out / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_mode_equals_the_reference_to_the_bit_in_any_space(dtype):
    x = made(2, 3, 33, 18, low=-0.6, high=0.6).to(dtype)
    x[0, 0, 3, 3], x[1, 1, 2, 2], x[1, 2, 8, 8] = torch.nan, torch.inf, -torch.inf
    mean, std = torch.tensor([0.48, 0.45, 0.4]), torch.tensor([0.23, 0.22, 0.225])
    settings = {"mode": "exact", "mean": mean, "std": std, "rounding": "fourier"}
    outs = [jpeg(x, torch.tensor([35, 90]), backend=b, **settings) for b in ("cpu", "reference")]
    assert outs[0].dtype == dtype and torch.equal(*outs)


@pytest.mark.parametrize("mode", ["smooth", "exact"])
def test_strides_of_any_kind_give_the_same_bits_in_the_layout_of_the_input(mode):
    x = made(2, 3, 33, 21)
    settings = {"rounding": "none", "mode": mode, "backend": "cpu"}
    plain = jpeg(x, 60, **settings)
    wide = made(4, 6, 66, 42)
    sliced = wide[::2, ::2, ::2, ::2].copy_(x)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (x.to(memory_format=torch.channels_last), sliced, turned, x.flip(3).flip(3)):
        out = jpeg(same, 60, **settings)
        assert torch.equal(out, plain) and out.stride() == torch.empty_like(same).stride()
    assert torch.equal(jpeg(x[:1].expand(2, -1, -1, -1), 60, **settings)[1], plain[0])
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(jpeg(grey, 60, **settings), jpeg(grey.contiguous(), 60, **settings))


def test_gradients_come_in_the_layout_of_the_input_from_one_of_any_strides():
    x = made(2, 3, 33, 21)
    _, plain, _ = results(x, torch.tensor([60.0]), torch.ones(()), "cpu", rounding="none")
    for w in (torch.ones(1).expand(2, 3, 33, 21), torch.ones(2, 3, 33, 21).to(memory_format=torch.channels_last)):
        last = x.to(memory_format=torch.channels_last)
        _, grad, _ = results(last, torch.tensor([60.0]), w, "cpu", rounding="none")
        assert torch.equal(grad, plain) and grad.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def threads():
    """Sets torch's number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("shape", [(1, 3, 333, 200), (3, 3, 200, 333), (5, 3, 64, 64)])
def test_bits_do_not_depend_on_threads(form, shape, threads):
    """One picture on several threads is cut into stretches of bands, whose edges must not show."""
    x, w = made(*shape), made(*shape, seed=1)
    quality = torch.linspace(20, 90, shape[0])
    settings = {"subsampling": form[0], "upsample": form[1]}
    found = []
    for count in (1, 2, 7):
        threads(count)
        exact = jpeg(x, quality.round(), subsampling=form[0], mode="exact", backend="cpu")
        found.append([*results(x, quality, w, "cpu", **settings), exact])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_each_picture_has_its_own_quality():
    x, quality = made(4, 3, 24, 20), torch.tensor([1.0, 30.0, 77.0, 100.0])
    together = jpeg(x, quality, backend="cpu")
    for i in range(4):
        assert torch.equal(together[i], jpeg(x[i : i + 1], quality[i], backend="cpu")[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = made(2, 3, 17, 21).to(dtype)
    out = jpeg(x, 60, rounding="none", backend="cpu")
    assert torch.equal(out, jpeg(x.float(), 60, rounding="none", backend="cpu").to(dtype))
    w = made(2, 3, 17, 21, seed=1).to(dtype)
    _, half, _ = results(x, torch.tensor([60.0]), w, "cpu", rounding="none")
    _, single, _ = results(x.float(), torch.tensor([60.0]), w.float(), "cpu", rounding="none")
    assert half.dtype == dtype and torch.equal(half, single.to(dtype))


def test_other_dtypes_of_the_result():
    x = made(1, 3, 9, 9)
    assert torch.equal(jpeg(x, 60, out_dtype=torch.float64, backend="cpu"), jpeg(x, 60, backend="cpu").double())
    pixels = (x * 255).to(torch.uint8)
    outs = [jpeg(pixels, 60, mode="exact", out_dtype=torch.float32, backend=b) for b in ("cpu", "reference")]
    assert torch.equal(*outs)


def test_a_nan_stays_in_its_neighbourhood():
    x = made(1, 3, 64, 48)
    clean = jpeg(x, 50, backend="cpu")
    x[0, 1, 20, 20] = torch.nan
    out = jpeg(x, 50, backend="cpu")
    spread = out.isnan().any(1)[0].nonzero()
    assert spread.min(0).values.tolist() >= [15, 15] and spread.max(0).values.tolist() <= [32, 32]
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_numbers_far_out_of_range_are_clamped_as_in_the_reference(rounding):
    x = torch.zeros(1, 3, 16, 16)
    x[..., :8] = 1e7
    outs = [jpeg(x, 90, subsampling="444", rounding=rounding, backend=b, check=False) for b in ("cpu", "reference")]
    assert (outs[0] - outs[1]).abs().max() < 2e-4


def test_no_pictures_give_no_pictures():
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    out = jpeg(x, 50, backend="cpu")
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 3, 8, 8)


def test_calls_on_the_cpu_take_it_by_themselves_where_it_can():
    x = made(1, 3, 8, 8).requires_grad_()
    stats(reset=True)
    jpeg(x, 50).sum().backward()
    assert stats()["runs"] == {"jpeg on cpu": 1, "jpeg_backward on cpu": 1}
    jpeg(x.double(), 50)
    assert stats(reset=True)["runs"]["jpeg on reference"] == 1


def test_what_is_not_covered_is_refused_with_the_reason():
    x = made(1, 3, 8, 8)
    with pytest.raises(BackendError, match="the cpu backend cannot run this call: float64 is for the reference"):
        jpeg(x.double(), 50, backend="cpu")
    with pytest.raises(BackendError, match="rounding='fourier' is for the reference"):
        jpeg(x, 50, rounding="fourier", backend="cpu")


def test_without_the_library_the_reference_runs_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "the CPU library is not built (no g++)")
    x = made(1, 3, 8, 8)
    assert dispatch.info()["cpu"] == "the CPU library is not built (no g++)"
    with pytest.raises(BackendError, match=r"the CPU library is not built \(no g\+\+\)"):
        jpeg(x, 50, backend="cpu")
    stats(reset=True)
    jpeg(x, 50, mode="exact")
    assert stats()["runs"] == {"jpeg on reference": 1}


def test_a_library_of_another_version_is_not_trusted(monkeypatch):
    class Longer(cpu_kernels._Call):
        _fields_ = [("more", cpu_kernels.ctypes.c_int64)]

    monkeypatch.setattr(cpu_kernels, "_Call", Longer)
    with pytest.raises(BackendError, match="the CPU library is of another version of poisonshield. Install it again"):
        cpu_kernels.jpeg(examples()["jpeg"][0])

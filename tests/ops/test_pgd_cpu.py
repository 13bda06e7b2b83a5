"""The compiled PGD kernels of the CPU, against the plain reference, which test_pgd_step.py holds to naive loops."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import native, pgd_random_start_, pgd_step_
from poisonshield.ops.pgd import cpu_kernels
from poisonshield.ops.pgd.reference import examples

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

SHAPE = (3, 3, 40, 33)
NORMS = ["linf", "l2", "sign_l2"]


def made(*shape, seed=0, normal=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


def cases():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    yield "plain", {}
    yield "targeted and a radius per sample", {"targeted": True, "eps": torch.tensor([0.01, 0.1, 0.0])}
    yield "normalized", {"mean": mean, "std": std}
    yield "strided statistics", {"mean": mean.repeat_interleave(2)[::2], "std": std.repeat_interleave(2)[::2]}
    yield "masked", {"mask": made(3, 1, 40, 33, seed=5) > 0.3, "active": torch.tensor([True, False, True])}
    yield "bytes", {"bytes": True, "mean": mean, "std": std, "mask": made(1, 3, 40, 1, seed=5) > 0.3}


CASES = dict(cases())


def stepped(x, clean, backend, steps=3, **settings):
    """x after some steps along made-up gradients with a zero and a NaN."""
    for i in range(steps):
        grad = made(*x.shape, seed=i, normal=True)
        grad[0, 0, 0, :2] = torch.tensor([0.0, torch.nan])
        pgd_step_(x, grad, clean, backend=backend, **settings)
    return x


def arguments(norm, case):
    """(x, clean, settings) of a case: x starts at clean."""
    case = dict(CASES[case])
    pixels = (made(*SHAPE) * 255).to(torch.uint8)
    x = pixels / 255
    if "mean" in case:
        x = (x - case["mean"].view(3, 1, 1)) / case["std"].view(3, 1, 1)
    clean = pixels if case.pop("bytes", False) else x.clone()
    sizes = {"step_size": 0.02 if norm != "l2" else 1.0, "eps": 0.05 if norm == "linf" else 1.5}
    return x, clean, {"norm": norm} | sizes | case


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_reference(norm, case):
    x, clean, settings = arguments(norm, case)
    ours, plain = (stepped(x.clone(), clean, backend, **settings) for backend in ("cpu", "reference"))
    assert (plain != x).any()
    if norm == "linf":
        assert torch.equal(ours, plain)
    else:
        assert (ours - plain).abs().max() < 2e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["plain", "normalized", "bytes"])
def test_layouts_give_the_same_in_place(norm, case):
    x, clean, settings = arguments(norm, case)
    plain = stepped(x.clone(), clean, "cpu", **settings)
    last = x.to(memory_format=torch.channels_last, copy=True)
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    sliced = torch.zeros(6, 3, 80, 66)[::2, :, ::2, ::2].copy_(x)
    for same in (last, swapped, sliced):
        address = same.data_ptr()
        stepped(same, clean, "cpu", **settings)
        assert same.data_ptr() == address
        # A ball's sums of squares are added up in the order of memory.
        assert torch.equal(same, plain) if norm == "linf" else (same - plain).abs().max() < 2e-6


def test_autograd_sees_the_change():
    x = made(1, 3, 8, 8)
    leaf = torch.ones(1, requires_grad=True)
    product = (leaf * x).sum()  # keeps x for its gradient
    pgd_step_(x, torch.ones_like(x), x.clone(), step_size=0.1, eps=0.2, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_flat_samples_and_clips():
    clean, grad = made(5, 7) * 1.4 - 0.2, made(5, 7, seed=1, normal=True)
    mean, std = made(7, seed=2), made(7, seed=3) + 0.5
    for norm in NORMS:
        outs = [
            pgd_step_(
                clean.clone(), grad, clean, step_size=0.3, eps=0.2, norm=norm, mean=mean, std=std, clip=(0.1, 0.8),
                backend=backend,
            )
            for backend in ("cpu", "reference")
        ]  # fmt: skip
        assert torch.equal(*outs) if norm == "linf" else (outs[0] - outs[1]).abs().max() < 2e-6


@pytest.mark.parametrize(
    "case", [{}, CASES["bytes"], {"mask": made(1, 3, 40, 33, seed=2) > 0.5}], ids=["plain", "bytes", "masked"]
)
@pytest.mark.parametrize("last", [False, True])
def test_linf_start_is_equal_to_the_bit(case, last):
    case = dict(case)
    pixels = (made(*SHAPE) * 255).to(torch.uint8)
    clean = pixels if case.pop("bytes", False) else made(*SHAPE)
    ids = torch.tensor([5, 2**35 + 1, -3])
    settings = {"eps": 0.1, "seed": 2**64 - 7, "offset": 3, "sample_ids": ids, **case}
    form = torch.channels_last if last else torch.contiguous_format
    outs = [
        pgd_random_start_(torch.empty(SHAPE).to(memory_format=form), clean, backend=backend, **settings)
        for backend in ("cpu", "reference")
    ]
    assert torch.equal(*outs)


@pytest.fixture
def threads():
    """Sets torch's number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 3, 300, 400), (5, 3, 200, 201)])
def test_bits_do_not_depend_on_threads(shape, threads):
    clean = made(*shape)
    found = []
    for count in (1, 2, 3):
        threads(count)
        steps = [stepped(clean.clone(), clean, "cpu", norm=n, step_size=0.3, eps=0.2) for n in NORMS]
        found.append([*steps, pgd_random_start_(clean.clone(), clean, eps=0.1, seed=3, backend="cpu")])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("scale", [1e-37, 1e-24, 1e20, 1e37])
def test_l2_steps_do_not_depend_on_the_size_of_the_gradient(scale):
    clean, grad = torch.full((2, 3, 40, 33), 0.5), made(2, 3, 40, 33, seed=1, normal=True) * scale
    outs = [
        pgd_step_(clean.clone(), grad, clean, step_size=0.1, eps=1.0, norm="l2", backend=b)
        for b in ("cpu", "reference")
    ]
    assert (outs[0] - outs[1]).abs().max() < 2e-7 and (outs[0] != clean).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_without_a_length_give_no_l2_step(bad):
    clean, grad = made(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    grad[0, 0, 0, 0] = bad
    out = pgd_step_(clean.clone(), grad, clean, step_size=0.1, eps=1.0, norm="l2", backend="cpu")
    assert torch.equal(out[0], clean[0]) and (out[1] != clean[1]).any()


def test_nan_pixels_stay_nan():
    clean = made(1, 3, 8, 8)
    x = clean.clone()
    clean[0, 0, 0, 0], x[0, 1, 1, 1] = torch.nan, torch.nan
    pgd_step_(x, torch.ones_like(x), clean, step_size=0.1, eps=0.2, backend="cpu")
    assert x.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_empty_batches_and_one_element():
    for shape in ((0, 3, 4, 4), (1, 1)):
        x, clean = torch.zeros(shape), torch.zeros(shape)
        pgd_step_(x, torch.ones(shape), clean, step_size=0.1, eps=0.05, backend="cpu")
        assert torch.equal(x, torch.full(shape, 0.05))


def test_what_is_not_covered_is_refused_with_the_reason():
    clean = made(2, 3, 8, 8)
    with pytest.raises(BackendError, match="levels is done by the reference alone"):
        pgd_step_(clean.clone(), clean.clone(), clean, step_size=0.1, eps=0.1, levels=255, backend="cpu")
    with pytest.raises(BackendError, match="x_adv is torch.bfloat16"):
        pgd_step_(clean.bfloat16(), clean, clean, step_size=0.1, eps=0.1, backend="cpu")
    with pytest.raises(BackendError, match="l2 start"):
        pgd_random_start_(clean.clone(), clean, eps=0.1, norm="l2", seed=0, backend="cpu")


def test_a_library_of_another_version_is_not_trusted(monkeypatch):
    class Longer(cpu_kernels._Call):
        _fields_ = [("more", cpu_kernels.ctypes.c_int64)]

    monkeypatch.setattr(cpu_kernels, "_Call", Longer)
    with pytest.raises(BackendError, match="the CPU library is of another version of poisonshield"):
        cpu_kernels.pgd_step_(examples()["pgd_step_"][0])

"""The Triton kernels of the PGD step in Triton's interpreter, against the plain reference."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import pgd_random_start_, pgd_step_
from poisonshield.ops.pgd.reference import examples

pytestmark = pytest.mark.usefixtures("interpreted")
SHAPE = (3, 3, 40, 33)


def made(*shape, seed=0, normal=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(shape, generator=generator)


def cases():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    yield "plain", {}
    yield "targeted and a radius per sample", {"targeted": True, "eps": torch.tensor([0.01, 0.1, 0.0])}
    yield "normalized", {"mean": mean, "std": std}
    yield "masked", {"mask": made(3, 1, 40, 33, seed=5) > 0.3, "active": torch.tensor([True, False, True])}
    yield "bytes", {"bytes": True, "mean": mean, "std": std}


@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
@pytest.mark.parametrize("case", [c for _, c in cases()], ids=[n for n, _ in cases()])
def test_steps_equal_the_reference(norm, case):
    case = dict(case)
    pixels = (made(*SHAPE) * 255).to(torch.uint8)
    space = pixels / 255
    if "mean" in case:
        space = (space - case["mean"].view(3, 1, 1)) / case["std"].view(3, 1, 1)
    x0 = pixels if case.pop("bytes", False) else space
    settings = {"norm": norm, "step_size": 0.02 if norm != "l2" else 1.0, "eps": 0.05 if norm == "linf" else 1.5} | case
    ours, plain = space.clone(), space.clone()
    for i in range(3):
        grad = made(*SHAPE, seed=i, normal=True)
        grad[0, 0, 0, :2] = torch.tensor([0.0, torch.nan])
        for x, backend in ((ours, "triton"), (plain, "reference")):
            pgd_step_(x, grad, x0, backend=backend, **settings)
    assert (plain != space).any()
    if norm == "linf":
        assert torch.equal(ours, plain)
    else:
        assert (ours - plain).abs().max() < 2e-6


@pytest.mark.parametrize("case", [{}, dict(list(cases())[4][1]), {"mask": made(1, 3, 40, 33, seed=2) > 0.5}])
def test_linf_start_is_equal_to_the_bit(case):
    case = dict(case)
    pixels = (made(*SHAPE) * 255).to(torch.uint8)
    x0 = pixels if case.pop("bytes", False) else made(*SHAPE)
    ids = torch.tensor([5, 2**35 + 1, -3])
    outs = [
        pgd_random_start_(torch.empty(SHAPE), x0, eps=0.1, seed=2**64 - 7, offset=3, sample_ids=ids, backend=b, **case)
        for b in ("triton", "reference")
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("scale", [1e-37, 1e-24, 1e20, 1e37])
def test_l2_steps_do_not_depend_on_the_size_of_the_gradient(scale):
    x0, grad = torch.full((2, 3, 40, 33), 0.5), made(2, 3, 40, 33, seed=1, normal=True) * scale
    outs = [
        pgd_step_(x0.clone(), grad, x0, step_size=0.1, eps=1.0, norm="l2", backend=b) for b in ("triton", "reference")
    ]
    assert (outs[0] - outs[1]).abs().max() < 2e-7 and (outs[0] != x0).any()


def test_autograd_sees_the_change():
    x = made(1, 3, 8, 8)
    version = x._version
    pgd_step_(x, torch.ones_like(x), x.clone(), step_size=0.1, eps=0.2, backend="triton")
    assert x._version > version


def test_nan_pixels_stay_nan():
    x0 = made(1, 3, 8, 8)
    x = x0.clone()
    x0[0, 0, 0, 0], x[0, 1, 1, 1] = torch.nan, torch.nan
    pgd_step_(x, torch.ones_like(x), x0, step_size=0.1, eps=0.2, backend="triton")
    assert x.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_what_is_not_covered_is_refused_with_the_reason():
    x0 = made(2, 3, 8, 8)
    with pytest.raises(BackendError, match="levels is done by the reference alone"):
        pgd_step_(x0.clone(), x0.clone(), x0, step_size=0.1, eps=0.1, levels=255, backend="triton")
    with pytest.raises(BackendError, match="x_adv is torch.bfloat16"):
        pgd_step_(x0.bfloat16(), x0, x0, step_size=0.1, eps=0.1, backend="triton")
    with pytest.raises(BackendError, match="l2 start"):
        pgd_random_start_(x0.clone(), x0, eps=0.1, norm="l2", seed=0, backend="triton")
    from poisonshield.ops.pgd import triton_kernels  # not above: kernels learn at import that they are interpreted

    example = examples()["pgd_step_"][0]._replace(x_adv=torch.empty(1, 2**31, device="meta"))
    assert "2^31 elements" in triton_kernels.refusal("pgd_step_", example)
    last = x0.to(memory_format=torch.channels_last)
    assert torch.equal(
        pgd_step_(last, x0.clone(), x0, step_size=0.1, eps=0.1),
        pgd_step_(x0.clone(), x0.clone(), x0, step_size=0.1, eps=0.1),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
def test_more_rows_than_a_second_grid_axis_holds(norm):
    x0, grad = made(70_000, 5).cuda(), made(70_000, 5, seed=1, normal=True).cuda()
    outs = [
        pgd_step_(x0.clone(), grad, x0, step_size=0.1, eps=0.1, norm=norm, backend=b) for b in ("triton", "reference")
    ]
    assert (outs[0] - outs[1]).abs().max() < 2e-6

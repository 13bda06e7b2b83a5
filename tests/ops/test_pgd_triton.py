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
    with pytest.raises(BackendError, match="x_adv is torch.float64"):
        pgd_step_(x0.double(), x0, x0, step_size=0.1, eps=0.1, backend="triton")
    from poisonshield.ops.pgd import triton_kernels  # not above: kernels learn at import that they are interpreted

    example = examples()["pgd_step_"][0]._replace(x_adv=torch.empty(1, 2**31, device="meta"))
    assert "2^31 elements" in triton_kernels.refusal("pgd_step_", example)
    away = examples()["pgd_random_start_"][0]._replace(sample_ids=torch.arange(2, device="meta"))
    assert triton_kernels.refusal("pgd_random_start_", away) == "a tensor is on meta and x_adv on cpu"


def laid(x, layout):
    """x with its dimensions in another order of memory, or with gaps between its samples."""
    if layout == "gaps":
        return torch.zeros(2 * len(x), *x.shape[1:], dtype=x.dtype)[::2].copy_(x)
    order = {"rows": [0, 1, 2, 3], "last": [0, 2, 3, 1], "swapped": [0, 1, 3, 2], "batch last": [1, 2, 3, 0]}[layout]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


@pytest.mark.parametrize("layout", ["last", "swapped", "batch last", "gaps"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("case", ["masked", "bytes"])
def test_layouts_give_the_same_bits_in_place(layout, norm, case):
    """A ball's sums are added up in the order of memory: float64, whose last places do not reach float32 here."""
    case, x0 = dict(cases())[case], made(3, 3, 11, 9)
    settings = {k: v[..., :11, :9] if k == "mask" else v for k, v in case.items() if k != "bytes"}
    if "bytes" in case:
        x0 = (x0 * 255).to(torch.uint8)
    plain, x = made(3, 3, 11, 9, seed=1), laid(made(3, 3, 11, 9, seed=1), layout)
    address, own = x.data_ptr(), {k: v for k, v in settings.items() if k != "active"}
    for out in (plain, x):
        pgd_random_start_(out, x0, eps=0.3, norm=norm, seed=5, backend="triton", **own)
        pgd_step_(
            out, made(3, 3, 11, 9, seed=2, normal=True), x0, step_size=0.1, eps=0.3, norm=norm, backend="triton",
            **settings,
        )  # fmt: skip
    assert torch.equal(x, plain) and x.data_ptr() == address and (x != made(3, 3, 11, 9, seed=1)).any()


@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "normalized", "bytes"])
def test_half_precision_equals_the_reference(norm, dtype, case):
    """linf to the bit; in a ball a number next to a tie may fall to the next one."""
    case, shape = dict(dict(cases())[case]), (2, 3, 11, 9)
    clean = (made(*shape) * 255).to(torch.uint8) if case.pop("bytes", False) else made(*shape).to(dtype)
    found = []
    for backend in ("triton", "reference"):
        x = torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)
        pgd_random_start_(x, clean, eps=0.1, norm=norm, seed=3, backend=backend, **case)
        grad = made(*shape, seed=2, normal=True).to(dtype)
        pgd_step_(x, grad, clean, step_size=0.05, eps=0.1, norm=norm, backend=backend, **case)
        found.append(x)
    apart = (found[0].float() - found[1].float()).abs()
    assert torch.equal(*found) if norm == "linf" else apart.max() <= 4 * torch.finfo(dtype).eps
    assert norm == "linf" or (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("shape, masked", [((3, 3, 40, 33), False), ((3, 3, 40, 33), True), ((2, 1), False)])
def test_starts_in_a_ball_equal_the_reference(shape, masked):
    x0, ids = torch.full(shape, 0.5), torch.tensor([5, 2**35 + 1, -3])[: shape[0]]
    mask = made(*shape, seed=5) > 0.3 if masked else None
    outs = [
        pgd_random_start_(
            torch.empty(shape), x0, eps=0.4, norm="l2", seed=2**64 - 7, offset=3, sample_ids=ids, mask=mask, backend=b
        )
        for b in ("triton", "reference")
    ]
    assert (outs[0] - outs[1]).abs().max() < 1e-6 and (outs[1] != x0).any()

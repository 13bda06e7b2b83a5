"""The PGD step against naive loops, other people's attacks, and its own promises."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from poisonshield.errors import BudgetError, GradientError, ShapeError
from poisonshield.ops import philox_uniform, use_backend
from poisonshield.ops.pgd import pgd_random_start_, pgd_step_


@pytest.fixture(scope="module", params=["auto", "reference"], autouse=True)
def backend(request):
    """What a CPU takes by itself, which is compiled where the library is built; and the oracle of all backends."""
    with use_backend(request.param):
        yield


def made(*shape, seed=0, dtype=torch.float32, normal=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn if normal else torch.rand
    return draw(shape, generator=generator, dtype=torch.float64).to(dtype)


def naive(x_adv, grad, x0, step, eps, norm, mean, std, mask, active, low=0.0, high=1.0):
    """One step in float64, a sample and a pixel at a time, from the definition. Lists of floats in pixel units."""
    out = x_adv.clone().double()
    b, c, h, w = x_adv.shape
    for i in range(b):
        if active is not None and not active[i]:
            continue
        free = [
            (k, y, z)
            for k in range(c)
            for y in range(h)
            for z in range(w)
            if mask is None or mask.expand(x_adv.shape)[i, k, y, z]
        ]
        m = [float(mean[k]) if mean is not None else 0.0 for k in range(c)]
        s = [float(std[k]) if std is not None else 1.0 for k in range(c)]

        def origin(k, y, z, i=i, m=m, s=s):
            return float(x0[i, k, y, z]) / 255 if x0.dtype == torch.uint8 else float(x0[i, k, y, z]) * s[k] + m[k]

        g = {p: float(grad[(i, *p)]) / s[p[0]] for p in free}
        length = math.sqrt(sum(v * v for v in g.values()))
        moved = {}
        for p in free:
            pixel = float(x_adv[(i, *p)]) * s[p[0]] + m[p[0]]
            direction = (g[p] > 0) - (g[p] < 0) if norm != "l2" else (g[p] / length if length > 0 else 0.0)
            moved[p] = pixel + float(step[i]) * direction - origin(*p)
        if norm == "linf":
            moved = {p: min(max(d, -float(eps[i])), float(eps[i])) for p, d in moved.items()}
        else:
            far = math.sqrt(sum(d * d for d in moved.values()))
            moved = {p: d * min(1.0, float(eps[i]) / far) if far > 0 else d for p, d in moved.items()}
        for k in range(c):
            for y in range(h):
                for z in range(w):
                    p = (k, y, z)
                    pixel = min(max(origin(*p) + moved[p], low), high) if p in moved else origin(*p)
                    out[(i, *p)] = (pixel - m[k]) / s[k]
    return out


CASES = [
    {},
    {"targeted": True},
    {"targeted": torch.tensor([True, False, True])},
    {"eps": torch.tensor([0.02, 0.1, 0.5]), "step_size": torch.tensor([0.01, 0.05, 0.3])},
    {"mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.2, 0.25, 0.3])},
    {"mask": (made(3, 1, 4, 5, seed=9) > 0.4)},
    {"mask": (made(1, 3, 4, 5, seed=8) > 0.4).float()},
    {"active": torch.tensor([True, False, True])},
    {"uint8": True},
    {"uint8": True, "mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.2, 0.25, 0.3])},
]


@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_equals_a_naive_loop(norm, case, dtype, tolerance):
    case = dict(case)
    pixels = (made(3, 3, 4, 5) * 255).round().to(torch.uint8)
    mean, std = case.get("mean"), case.get("std")
    space = pixels.to(dtype) / 255
    if mean is not None:
        space = (space - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    space = space.to(dtype)
    x0 = pixels if case.pop("uint8", False) else space
    x = space.clone()
    eps, step = case.pop("eps", torch.full((3,), 0.1)), case.pop("step_size", torch.full((3,), 0.04))
    targeted = case.get("targeted", False)
    signs = -2.0 * (targeted if isinstance(targeted, torch.Tensor) else torch.full((3,), bool(targeted))).double() + 1
    expected = x.double().clone()
    for i in range(4):
        grad = made(3, 3, 4, 5, seed=i + 1, dtype=dtype, normal=True)
        pgd_step_(x, grad, x0, step_size=step, eps=eps, norm=norm, **case)
        expected = naive(
            expected, grad, x0, step.double() * signs, eps, norm, mean, std, case.get("mask"), case.get("active")
        )
    assert (x.double() - expected).abs().max() < tolerance
    assert (x - space).abs().max() > 0.01


def test_ten_linf_steps_equal_a_naive_float32_loop_to_the_bit():
    x0 = made(2, 3, 9, 7)
    x, y = x0.clone(), x0.numpy().copy()
    step, eps = np.float32(2 / 255), np.float32(8 / 255)
    for i in range(10):
        grad = made(2, 3, 9, 7, seed=i, normal=True)
        pgd_step_(x, grad, x0, step_size=2 / 255, eps=8 / 255)
        y = y + step * np.sign(grad.numpy())
        y = np.minimum(np.maximum(y, np.maximum(x0.numpy() - eps, np.float32(0))), np.minimum(x0.numpy() + eps, 1))
        assert np.array_equal(x.numpy(), y)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 5))

    def forward(self, x):
        return self.net(x)


def trajectory(model, x0, y, steps, **settings):
    x = x0.clone()
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
        pgd_step_(x, grad, x0, **settings)
    return x


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ten_steps_equal_torchattacks(norm):
    torchattacks = pytest.importorskip("torchattacks")
    model, x0, y = Tiny().eval(), made(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    if norm == "linf":
        theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)(x0, y)
        ours = trajectory(model, x0, y, 10, step_size=2 / 255, eps=8 / 255)
    else:
        theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10, random_start=False)(x0, y)
        ours = trajectory(model, x0, y, 10, step_size=0.1, eps=0.5, norm="l2")
    assert (ours - x0).abs().max() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ten_steps_equal_foolbox(norm):
    foolbox = pytest.importorskip("foolbox")
    model, x0, y = Tiny().eval(), made(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    attacks = foolbox.attacks
    cls, step, eps = {
        "linf": (attacks.LinfProjectedGradientDescentAttack, 2 / 255, 8 / 255),
        "l2": (attacks.L2ProjectedGradientDescentAttack, 0.1, 0.5),
    }[norm]
    attack = cls(abs_stepsize=step, steps=10, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = attack.run(wrapped, x0, foolbox.criteria.Misclassification(y), epsilon=eps)
    ours = trajectory(model, x0, y, 10, step_size=step, eps=eps, norm=norm)
    assert (ours - theirs).abs().max() <= 1e-6


@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0, 1, width=32),
    step=st.floats(0, 2, width=32),
    norm=st.sampled_from(["linf", "l2", "sign_l2"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    normalized=st.booleans(),
    start=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_ball_and_the_range_always_hold(seed, eps, step, norm, dtype, normalized, start):
    mean, std = (torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0.25, 0.5, 0.125])) if normalized else (None, None)
    pixels = made(2, 3, 5, 4, seed=seed)
    x0 = ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1) if normalized else pixels).to(dtype)
    x = x0.clone()
    if start:
        pgd_random_start_(x, x0, eps=eps, norm=norm, seed=seed, mean=mean, std=std)
    for i in range(3):
        pgd_step_(x, made(2, 3, 5, 4, seed=i, normal=True), x0, step_size=step, eps=eps, norm=norm, mean=mean, std=std)
    scale = std.view(3, 1, 1).double() if normalized else 1.0
    delta = ((x.double() - x0.double()) * scale).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    # One rounding of x in float32 is 6e-8 (1.2e-7 where it is over 1), eight times smaller than a level of 16 bits.
    slack = 5e-7
    assert (length <= eps * (1 + 1e-6) + slack).all()
    if dtype == torch.float32:
        pixel = x.double() * scale + (mean.view(3, 1, 1).double() if normalized else 0.0)
        assert pixel.min() >= -1e-6 and pixel.max() <= 1 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
def test_the_ball_holds_after_saving_as_png(norm):
    eps = 8 / 255 if norm == "linf" else 0.7
    pixels = (made(2, 3, 16, 16) * 255).round().to(torch.uint8)
    x0 = pixels / 255
    x = x0.clone()
    pgd_random_start_(x, x0, eps=eps, norm=norm, seed=1, levels=255)
    for i in range(3):
        grad = made(2, 3, 16, 16, seed=i, normal=True)
        pgd_step_(x, grad, x0, step_size=3 / 255, eps=eps, norm=norm, levels=255)
        for row in range(2):
            buffer = io.BytesIO()
            Image.fromarray((x[row] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
            saved = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)
            assert torch.equal(saved / 255, x[row])  # nothing is lost
            delta = (saved.double() - pixels[row].double()) / 255
            assert (delta.abs().max() if norm == "linf" else delta.norm()) <= eps * (1 + 1e-6)
    assert (x != x0).any()


def test_changes_in_place_and_says_so():
    x0 = made(2, 3, 4, 4)
    x = x0.clone()
    address, version = x.data_ptr(), x._version
    assert pgd_step_(x, made(2, 3, 4, 4, seed=1, normal=True), x0, step_size=0.1, eps=0.2) is x
    assert x.data_ptr() == address and x._version > version
    assert pgd_random_start_(x, x0, eps=0.1, seed=0) is x
    kept = (made(2, 3, 4, 4).requires_grad_() * x).sum()  # x is saved for this backward, and then changed
    pgd_step_(x, x0.clone(), x0, step_size=0.1, eps=0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_channels_last_gives_the_same():
    x0, grad = made(2, 3, 6, 5), made(2, 3, 6, 5, seed=1, normal=True)
    plain = pgd_step_(x0.clone(), grad, x0, step_size=0.1, eps=0.2)
    last = x0.clone(memory_format=torch.channels_last)
    assert torch.equal(pgd_step_(last, grad, x0, step_size=0.1, eps=0.2), plain)
    assert torch.equal(
        pgd_random_start_(last, x0, eps=0.1, seed=3), pgd_random_start_(plain.clone(), x0, eps=0.1, seed=3)
    )


@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
def test_a_radius_of_zero_gives_the_clipped_original(norm):
    x0 = made(2, 3, 4, 4) * 1.4 - 0.2
    x = x0 + 0.1
    pgd_step_(x, made(2, 3, 4, 4, seed=1, normal=True), x0, step_size=0.1, eps=0, norm=norm)
    assert torch.equal(x, x0.clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_useless_gradients_give_no_step(norm):
    x0 = made(3, 3, 4, 4)
    x, grad = x0.clone(), torch.zeros(3, 3, 4, 4)
    grad[1, 0, 0, 0], grad[2, 0, 0, 0], grad[2, 0, 0, 1] = torch.nan, torch.inf, 1.0
    pgd_step_(x, grad, x0, step_size=0.1, eps=0.2, norm=norm)
    assert torch.equal(x[:2], x0[:2])
    assert torch.equal(x[2], x0[2]) == (norm == "l2")


@pytest.mark.parametrize("scale", [1e-37, 1e-24, 1.0, 1e20, 1e37])
def test_l2_steps_do_not_depend_on_the_size_of_the_gradient(scale):
    """Squares of these leave the range of float32; a sure model's gradients are that small."""
    x0, grad = torch.full((2, 3, 8, 8), 0.5), made(2, 3, 8, 8, seed=1, normal=True)
    moved = pgd_step_(x0.clone(), grad * scale, x0, step_size=0.1, eps=1.0, norm="l2") - x0
    expected = 0.1 * grad / grad.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    torch.testing.assert_close(moved, expected, atol=1e-7, rtol=1e-5)


def test_nan_pixels_stay_nan():
    x0 = made(1, 3, 4, 4)
    x = x0.clone()
    x0[0, 0, 0, 0], x[0, 1, 1, 1] = torch.nan, torch.nan
    pgd_step_(x, torch.ones_like(x), x0, step_size=0.1, eps=0.2)
    assert x.isnan().nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_one_element_and_empty_batches():
    x = torch.tensor([[0.5]])
    assert pgd_step_(x, torch.tensor([[-1.0]]), x.clone(), step_size=0.25, eps=1).item() == 0.25
    empty = torch.empty(0, 3, 4, 4)
    assert pgd_step_(empty, empty.clone(), empty.clone(), step_size=0.1, eps=0.1).shape == empty.shape


def test_linf_start_is_the_shared_generator_to_the_bit():
    x0 = made(3, 3, 5, 4)
    ids = torch.tensor([7, 2**40, -1])
    x = pgd_random_start_(x0.clone(), x0, eps=0.1, seed=2**63 + 5, offset=4, sample_ids=ids, stream=9)
    u = philox_uniform(x0.shape, 2**63 + 5 - 2**64, 4, sample_ids=ids, stream=9)
    expected = (x0 + (2 * u - 1) * torch.tensor(0.1)).clamp(0, 1)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_does_not_depend_on_the_batch(norm):
    x0 = made(6, 3, 5, 4)
    whole = pgd_random_start_(x0.clone(), x0, eps=0.3, norm=norm, seed=1)
    for part in ([0, 1], [2, 3, 4], [5]):
        rows = torch.tensor(part)
        some = pgd_random_start_(x0[rows].clone(), x0[rows], eps=0.3, norm=norm, seed=1, sample_ids=rows)
        assert torch.equal(some, whole[rows])
    for change in ({"seed": 2}, {"seed": 1, "offset": 1}, {"seed": 1, "stream": 3}):
        other = pgd_random_start_(x0.clone(), x0, eps=0.3, norm=norm, **change)
        a, b = (other - x0).flatten(), (whole - x0).flatten()
        assert abs(float((a * b).mean() / (a.norm() * b.norm()) * len(a))) < 0.15


def test_linf_start_is_uniform():
    from scipy.stats import kstest

    x0 = torch.full((4, 3, 50, 50), 0.5, dtype=torch.float64)
    delta = pgd_random_start_(x0.clone(), x0, eps=0.1, seed=0) - x0
    assert kstest((delta.flatten() / 0.2 + 0.5).numpy(), "uniform").pvalue > 0.01


def test_l2_start_fills_the_ball():
    from scipy.stats import kstest

    x0 = torch.full((2000, 5), 0.5, dtype=torch.float64)
    delta = pgd_random_start_(x0.clone(), x0, eps=0.3, norm="l2", seed=0) - x0
    assert kstest(((delta.norm(dim=1) / 0.3) ** 5).numpy(), "uniform").pvalue > 0.01
    assert delta.mean(0).abs().max() < 0.01


def test_numbers_may_be_tensors_that_change_without_recompiling():
    from torch._dynamo.testing import CompileCounter

    count = CompileCounter()

    @torch.compile(fullgraph=True, backend=count)
    def f(x, grad, x0, step, eps):
        return pgd_step_(x, grad, x0, step_size=step, eps=eps)

    x0, grad = made(2, 3, 4, 4), made(2, 3, 4, 4, seed=1, normal=True)
    for eps in (0.1, 0.2, 0.3):
        out = f(x0.clone(), grad, x0, torch.tensor(0.5), torch.tensor(eps))
        assert torch.equal(out, pgd_step_(x0.clone(), grad, x0, step_size=0.5, eps=eps))
    assert count.frame_count == 1


X = torch.zeros(2, 3, 4, 4)
G = torch.ones(2, 3, 4, 4)


def step(x=None, grad=G, clean=None, **settings):
    x = X.clone() if x is None else x
    return pgd_step_(x, grad, X if clean is None else clean, **{"step_size": 0.1, "eps": 0.1, **settings})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: step(grad=G[:1]), ShapeError, r"grad has shape \(1, 3, 4, 4\)"),
        (lambda: step(clean=X[..., :2]), ShapeError, "clean has shape"),
        (lambda: step(grad=G.to("meta")), ValueError, "grad is on meta and x_adv on cpu"),
        (lambda: step(X[:1].expand(2, -1, -1, -1)), ShapeError, "expanded view"),
        (lambda: step(torch.zeros(4), G[0, 0, 0], X[0, 0, 0]), ShapeError, "Give a batch"),
        (lambda: step(X.clone().requires_grad_()), GradientError, "no_grad"),
        (lambda: step(X, clean=X), ValueError, "clean shares memory"),
        (lambda: step(G), ValueError, "grad shares memory"),
        (lambda: step(X.int()), TypeError, "Give a float tensor"),
        (lambda: step(grad=G.int()), TypeError, "grad is torch.int32"),
        (lambda: step(clean=X.int()), TypeError, "uint8 pixels"),
        (lambda: step(eps=-0.1), BudgetError, "eps -0.1 is negative"),
        (lambda: step(step_size=float("nan")), BudgetError, "step_size nan"),
        (lambda: step(eps=torch.tensor([0.1, -0.1])), BudgetError, "negative or NaN entry"),
        (lambda: step(eps=torch.ones(3)), ShapeError, "for 2 samples"),
        (lambda: step(eps="8/255"), TypeError, "eps is a str"),
        (lambda: step(norm="l1"), ValueError, "Known: linf, l2, sign_l2"),
        (lambda: step(mean=torch.zeros(3)), ValueError, "go together"),
        (lambda: step(mean=torch.zeros(3), std=torch.zeros(3)), ValueError, "must be positive"),
        (lambda: step(mean=torch.zeros(2), std=torch.ones(3)), ShapeError, r"Give a tensor \[3\]"),
        (lambda: step(mask=torch.ones(2, 3, 4)), ShapeError, "does not broadcast"),
        (lambda: step(active=torch.ones(2)), ShapeError, "Give a bool tensor"),
        (lambda: step(active=torch.ones(2, device="meta").bool()), ValueError, "active is on meta and x_adv on cpu"),
        (lambda: step(mask=torch.ones(2, 3, 4, 4, device="meta")), ValueError, "mask is on meta and x_adv on cpu"),
        (lambda: step(targeted=torch.ones(2)), ShapeError, "targeted is"),
        (lambda: step(clip=(1, 0)), ValueError, "is empty"),
        (lambda: step(levels=-1), ValueError, "levels -1"),
        (lambda: step(levels=2.5), TypeError, "levels is a float. Give a whole number"),
        (lambda: step(levels=True), TypeError, "levels is a bool"),
        (lambda: step(clip=(0, float("nan"))), ValueError, "is empty"),
        (lambda: step(clip=(0, 1, 2)), TypeError, "Give two numbers"),
        (lambda: step(clip=None), TypeError, "Give two numbers"),
        (lambda: step(X.to(torch.float8_e4m3fn)), TypeError, "float8"),
        (lambda: step(X.to_sparse()), TypeError, "sparse"),
        (lambda: step(clean=[0]), TypeError, "clean is a list"),
        (lambda: step(grad=None), TypeError, "grad is a NoneType"),
        (lambda: step(step_size=-0.1), BudgetError, "step_size -0.1 is negative"),
        (lambda: step(eps=float("nan")), BudgetError, "eps nan"),
        (lambda: step(eps=1j), TypeError, "eps is a complex"),
        (lambda: step(eps=None), TypeError, "eps is a NoneType"),
        (lambda: step(eps=torch.ones(2, 1)), ShapeError, "for 2 samples"),
        (lambda: step(eps=torch.zeros(2, device="meta")), ValueError, "eps is on meta and x_adv on cpu"),
        (lambda: step(mean=torch.full((3,), float("nan")), std=torch.ones(3)), ValueError, "not finite"),
        (lambda: step(mean=torch.zeros(3), std=torch.full((3,), float("inf"))), ValueError, "not finite"),
        (lambda: step(mean=torch.zeros(3, device="meta"), std=torch.ones(3)), ValueError, "mean is on meta"),
        (lambda: step(mean=[0.0] * 3, std=[1.0] * 3), ShapeError, "mean is a list"),
        (lambda: step(mask=[1]), TypeError, "mask is a list"),
        (lambda: step(mask=torch.ones(2, 1, 1, 1) + 1j), TypeError, "complex"),
        (lambda: step(active=[True, False]), ShapeError, "active is a list"),
        (lambda: step(targeted="no"), TypeError, "targeted is 'no'"),
        (lambda: step(targeted=None), TypeError, "targeted is None"),
        (lambda: step(targeted=torch.ones(2, device="meta").bool()), ValueError, "targeted is on meta"),
        (lambda: step(norm=["linf"]), ValueError, "Known: linf"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed="7"), TypeError, "seed is a str. Give an integer"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=1.5), TypeError, "seed is a float"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=None), TypeError, "seed is a NoneType"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=1, stream=0.5), TypeError, "stream is a float"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=1, sample_ids=[1, 2]), ShapeError, "sample_ids is a li"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=torch.zeros(2).long()), ShapeError, "seed is"),
        (lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=1, sample_ids=torch.ones(2)), ShapeError, "sample_ids"),
        (
            lambda: pgd_random_start_(X.clone(), X, eps=0.1, seed=1, sample_ids=torch.ones(2, device="meta").long()),
            ValueError,
            "sample_ids is on meta and x_adv on cpu",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Noising and the masked loss against diffusers, a slow loop and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from poisonshield.errors import GradientError, ShapeError
from poisonshield.ops import masked_diffusion_loss, q_sample
from poisonshield.random import philox_normal

T = 50
ALPHAS = torch.linspace(0.999, 0.01, T, dtype=torch.float64)


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def scheduler():
    return pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=T)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 4, 6, 5), (2, 4, 3, 4, 5)])
def test_noising_equals_diffusers(scheduler, dtype, rtol, shape):
    x0, noise = made(*shape, dtype=dtype), made(*shape, seed=1, dtype=dtype)
    t = torch.tensor([0, 20, T - 1][: shape[0]])
    x_t, kept = q_sample(x0, t, scheduler.alphas_cumprod, noise=noise)
    assert kept is noise and x_t.dtype == dtype
    expected = scheduler.add_noise(x0.double(), noise.double(), t)
    torch.testing.assert_close(x_t.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_v_loss_equals_the_eager_one_with_diffusers_velocity(scheduler, dtype, rtol):
    x0, noise, pred = (made(3, 4, 6, 5, seed=s, dtype=dtype) for s in range(3))
    t = torch.tensor([0, 20, T - 1])
    ours = masked_diffusion_loss(
        pred, x0=x0, noise=noise, t=t, alphas_cumprod=scheduler.alphas_cumprod, prediction_type="v"
    )
    velocity = scheduler.get_velocity(x0.float(), noise.float(), t)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, F.mse_loss(pred.float(), velocity), rtol=rtol, atol=0)


def slow(pred, target, mask, weight, loss, delta, normalize, reduction):
    """The definition, an element at a time."""
    b = len(pred)
    sums, areas = [], []
    m_full = torch.ones_like(pred) if mask is None else mask.double().expand(pred.shape)
    for i in range(b):
        s = a = 0.0
        for p, q, m in zip(
            pred[i].flatten().tolist(), target[i].flatten().tolist(), m_full[i].flatten().tolist(), strict=True
        ):
            a += m
            if m == 0:
                continue
            r = p - q
            value = {
                "mse": r * r,
                "l1": abs(r),
                "huber": r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2),
            }
            s += m * value[loss]
        sums.append(s * (1.0 if weight is None else float(weight[i])))
        areas.append(a)
    each = pred[0].numel()
    if normalize == "per_sample":
        terms = [s / max(a, 1.0) for s, a in zip(sums, areas, strict=True)]
        return {"none": terms, "sum": sum(terms), "mean": sum(terms) / b}[reduction]
    if normalize == "global":
        terms = [s / max(sum(areas), 1.0) for s in sums]
        return {"none": terms, "sum": sum(terms), "mean": sum(terms)}[reduction]
    terms = [s / each for s in sums]
    return {"none": terms, "sum": sum(terms), "mean": sum(terms) / b}[reduction]


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("normalize", ["per_sample", "global", "numel"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_a_slow_loop(loss, normalize, reduction):
    pred, target = made(3, 2, 4, 5), made(3, 2, 4, 5, seed=1)
    masks = [
        None,
        made(3, 1, 4, 5, seed=2) > 0,
        made(1, 1, 4, 5, seed=3).clamp(min=0),
        torch.zeros(3, 1, 4, 5),
        torch.cat([torch.zeros(1, 2, 4, 5), made(2, 2, 4, 5, seed=4).abs()]),
    ]
    for mask in masks:
        for weight in (None, torch.tensor([0.5, 2.0, 0.0])):
            settings = {"loss": loss, "delta": 0.7, "normalize": normalize, "reduction": reduction}
            out = masked_diffusion_loss(pred, target=target, mask=mask, weight=weight, **settings)
            expected = torch.tensor(slow(pred, target, mask, weight, **settings), dtype=torch.float64)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
def test_min_snr_weights_and_their_limits(prediction_type):
    alphas = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    pred, x0, noise = (made(5, 2, 3, 3, seed=s) for s in range(3))
    t = torch.arange(5)
    settings = {"x0": x0, "noise": noise, "t": t, "alphas_cumprod": alphas, "prediction_type": prediction_type}
    plain = masked_diffusion_loss(pred, reduction="none", **settings)
    weighted = masked_diffusion_loss(pred, reduction="none", weight="min_snr", gamma=5.0, **settings)
    for i, a in enumerate(alphas.tolist()):
        snr = a / (1 - a) if a < 1 else math.inf
        if prediction_type == "epsilon":
            w = 1.0 if snr == 0 else (0.0 if snr == math.inf else min(snr, 5) / snr)
        elif prediction_type == "v":
            w = 0.0 if snr == math.inf else min(snr, 5) / (snr + 1)
        else:
            w = min(snr, 5)
        assert weighted[i].item() == pytest.approx(w * plain[i].item(), rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_gradcheck_of_everything(prediction_type, loss):
    t = torch.tensor([3, 40])
    pred, x0, noise = (made(2, 2, 3, 3, seed=s).requires_grad_() for s in range(3))
    mask = made(2, 1, 3, 3, seed=5).abs()

    def f(pred, x0, noise, reduction):
        return masked_diffusion_loss(
            pred, x0=x0, noise=noise, t=t, alphas_cumprod=ALPHAS, prediction_type=prediction_type, mask=mask,
            weight="min_snr", loss=loss, reduction=reduction, grad_target=True,
        )  # fmt: skip

    for reduction in ("mean", "sum", "none"):
        assert gradcheck(lambda *a, reduction=reduction: f(*a, reduction) * 3, (pred, x0, noise))


@pytest.mark.parametrize("normalize", ["per_sample", "global", "numel"])
def test_gradcheck_of_pred_and_target(normalize):
    pred, target = (made(2, 2, 3, 3, seed=s).requires_grad_() for s in range(2))
    mask = made(2, 2, 3, 3, seed=5) > 0
    assert gradcheck(
        lambda p, q: masked_diffusion_loss(p, target=q, mask=mask, normalize=normalize, grad_target=True),
        (pred, target),
    )
    masked_diffusion_loss(pred, target=target).backward()
    assert pred.grad is not None and target.grad is None


@pytest.mark.parametrize("twice", [(True, False), (False, True), (True, True)])
def test_second_derivatives_are_refused(twice):
    """Of pred, of the target, or of both: they were 0 once, without a word."""
    leaves = [made(2, 2, 3, 3, seed=s).requires_grad_() for s in range(2)]
    out = masked_diffusion_loss(leaves[0], target=leaves[1], grad_target=True)
    chosen = [leaf for leaf, wanted in zip(leaves, twice, strict=True) if wanted]
    grads = torch.autograd.grad(out, chosen, create_graph=True)
    assert all(g.any() for g in grads)
    with pytest.raises(GradientError, match="no second derivatives"):
        sum(g.square().sum() for g in grads).backward()


def test_second_derivatives_are_refused_by_torch_func():
    f = lambda p: masked_diffusion_loss(p, target=torch.zeros_like(p))  # noqa: E731
    with pytest.raises(GradientError, match="no second derivatives"):
        torch.func.grad(lambda p: torch.func.grad(f)(p).square().sum())(made(2, 2, 3, 3))


def test_a_gradient_is_differentiable_in_what_scales_it():
    """The loss is linear in a factor outside, so this derivative of the gradient is known: the gradient itself."""
    pred, factor = made(2, 2, 3, 3).requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(
        masked_diffusion_loss(pred, target=made(2, 2, 3, 3, seed=1)) * factor, pred, create_graph=True
    )
    (by_factor,) = torch.autograd.grad(g.sum(), factor)
    assert by_factor.item() == pytest.approx(g.sum().item() / 2)


@pytest.mark.parametrize("name", ["mask", "weight", "alphas_cumprod"])
def test_what_gets_no_gradient_may_not_require_one(name):
    pred, t = made(2, 2, 3, 3), torch.tensor([3, 40])
    settings = {"mask": torch.ones(2, 1, 3, 3), "weight": torch.ones(2), "alphas_cumprod": ALPHAS.clone()}
    settings[name].requires_grad_()
    run = lambda: masked_diffusion_loss(pred, target=pred * 2, t=t, **settings)  # noqa: E731
    with pytest.raises(
        GradientError, match=f"{name} requires gradients, and none would reach it. Give {name}.detach()"
    ):
        run()
    with torch.no_grad():
        assert run() > 0
    if name == "alphas_cumprod":
        with pytest.raises(GradientError, match="alphas_cumprod requires gradients"):
            q_sample(pred, t, settings[name], seed=0)


def test_gradcheck_of_noising():
    x0, noise = (made(2, 2, 3, 3, seed=s).requires_grad_() for s in range(2))
    t = torch.tensor([0, 40])
    assert gradcheck(lambda x, n: q_sample(x, t, ALPHAS, noise=n)[0], (x0, noise))
    assert gradcheck(lambda x: q_sample(x, t, ALPHAS, seed=3)[0], (x0,))


def test_nan_under_the_mask_leaks_nowhere():
    pred, target = made(2, 2, 3, 3), made(2, 2, 3, 3, seed=1)
    mask = torch.ones(2, 1, 3, 3)
    mask[0, 0, 1, 1] = 0
    clean = masked_diffusion_loss(pred, target=target, mask=mask)
    for bad in (torch.nan, torch.inf):
        dirty = pred.clone()
        dirty[0, :, 1, 1] = bad
        dirty.requires_grad_()
        out = masked_diffusion_loss(dirty, target=target, mask=mask)
        out.backward()
        assert torch.equal(out.detach(), clean)
        assert dirty.grad.isfinite().all() and not dirty.grad[0, :, 1, 1].any()


def test_an_empty_mask_is_exactly_zero():
    pred = made(2, 2, 3, 3).requires_grad_()
    out = masked_diffusion_loss(pred, target=made(2, 2, 3, 3, seed=1), mask=torch.zeros(1, 1, 3, 3))
    out.backward()
    assert out.item() == 0 and not pred.grad.any()


def test_an_empty_batch_is_zero_with_a_gradient():
    pred = torch.empty(0, 4, 3, 3, requires_grad=True)
    for normalize in ("per_sample", "global", "numel"):
        out = masked_diffusion_loss(pred, target=torch.empty(0, 4, 3, 3), normalize=normalize)
        assert out.item() == 0 and out.grad_fn is not None
        out.backward()
    t = torch.empty(0, dtype=torch.int64)
    assert q_sample(pred.detach(), t, ALPHAS, seed=0)[0].shape == pred.shape


def test_regenerated_noise_is_the_stored_noise():
    x0, pred, t = made(3, 4, 5, 5, dtype=torch.float32), made(3, 4, 5, 5, seed=1, dtype=torch.float32), torch.arange(3)
    x_t, noise = q_sample(x0, t, ALPHAS, seed=7, offset=2)
    again, nothing = q_sample(x0, t, ALPHAS, seed=7, offset=2, return_noise=False)
    assert nothing is None and torch.equal(again, x_t)
    assert torch.equal(x_t, q_sample(x0, t, ALPHAS, noise=noise)[0])
    for kind in ("epsilon", "v"):
        settings = {"x0": x0, "t": t, "alphas_cumprod": ALPHAS, "prediction_type": kind}
        stored = masked_diffusion_loss(pred, noise=noise, **settings)
        assert torch.equal(masked_diffusion_loss(pred, seed=7, offset=2, **settings), stored)
    assert torch.equal(
        q_sample(x0[1:2], t[1:2], ALPHAS, seed=7, offset=3)[1], q_sample(x0[:1], t[:1], ALPHAS, seed=7, offset=3)[1]
    )
    expected = philox_normal(100, seed=7, ids=torch.arange(3), offset=2, stream=0x64696666).view(3, 4, 5, 5)
    assert torch.equal(noise, expected)


def test_rows_do_not_depend_on_each_other_and_runs_repeat():
    pred, target = made(4, 4, 16, 16, dtype=torch.float32), made(4, 4, 16, 16, seed=1, dtype=torch.float32)
    mask = made(4, 1, 16, 16, seed=2, dtype=torch.float32) > 0

    def run(rows):
        return masked_diffusion_loss(pred[rows], target=target[rows], mask=mask[rows], reduction="none")

    whole = run(slice(0, 4))
    assert torch.equal(run(slice(0, 4)), whole)
    other = pred.clone()
    other[1:] = 100
    assert torch.equal(masked_diffusion_loss(other, target=target, mask=mask, reduction="none")[0], whole[0])
    torch.testing.assert_close(torch.cat([run(slice(i, i + 1)) for i in range(4)]), whole)


def test_out_and_out_dtype():
    x0, t = made(2, 4, 3, 3, dtype=torch.float32), torch.tensor([1, 2])
    wide = torch.zeros(2, 9, 3, 3)
    x_t, _ = q_sample(x0, t, ALPHAS, seed=1)
    q_sample(x0, t, ALPHAS, seed=1, out=wide[:, :4])
    assert torch.equal(wide[:, :4], x_t) and not wide[:, 4:].any()
    assert q_sample(x0, t, ALPHAS, seed=1, out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert q_sample(x0.to(memory_format=torch.channels_last), t, ALPHAS, seed=1)[0].is_contiguous(
        memory_format=torch.channels_last
    )


def test_timesteps_change_without_recompiling():
    from torch._dynamo.testing import CompileCounter

    count = CompileCounter()
    x0, pred = made(2, 4, 3, 3, dtype=torch.float32), made(2, 4, 3, 3, seed=1, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend=count)
    def f(pred, x0, t, seed):
        x_t, noise = q_sample(x0, t, ALPHAS, seed=seed)
        return x_t.sum() + masked_diffusion_loss(pred, noise=noise)

    for i in range(3):
        t, seed = torch.tensor([i, 2 * i]), torch.tensor(i)
        x_t, noise = q_sample(x0, t, ALPHAS, seed=i)
        assert torch.equal(f(pred, x0, t, seed), x_t.sum() + masked_diffusion_loss(pred, noise=noise))
    assert count.frame_count == 1


X = torch.zeros(2, 4, 3, 3)
TS = torch.tensor([0, 1])
MASK, NAN = torch.ones(2, 1, 1, 1), float("nan")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: q_sample(X.int(), TS, ALPHAS, seed=0), TypeError, "x0 is torch.int32"),
        (lambda: q_sample(X, TS, ALPHAS), ValueError, "either noise or seed"),
        (lambda: q_sample(X, TS, ALPHAS, noise=X, seed=1), ValueError, "either noise or seed"),
        (lambda: q_sample(X, TS[:1], ALPHAS, seed=1), ShapeError, r"t is torch.int64 \(1,\)"),
        (lambda: q_sample(X, TS.float(), ALPHAS, seed=1), ShapeError, "Give int64"),
        (lambda: q_sample(X, TS + T, ALPHAS, seed=1), ValueError, "alphas_cumprod has 0..49"),
        (lambda: q_sample(X, TS - 1, ALPHAS, seed=1), ValueError, "from -1"),
        (lambda: q_sample(X, TS, ALPHAS[None], seed=1), ShapeError, "floats"),
        (lambda: q_sample(X, TS, ALPHAS, noise=X[:1]), ShapeError, "noise has shape"),
        (lambda: q_sample(X, TS, ALPHAS, seed=1, out=X[:1].clone()), ShapeError, "out has shape"),
        (lambda: q_sample(X.clone().requires_grad_(), TS, ALPHAS, seed=1, out=X.clone()), ValueError, "cannot carry"),
        (lambda: q_sample(X, TS, ALPHAS, seed=torch.zeros(2).long()), ShapeError, "seed is"),
        (lambda: masked_diffusion_loss(X), ValueError, "no noise or seed"),
        (lambda: masked_diffusion_loss(X, noise=X, prediction_type="v"), ValueError, "no x0, no t and alphas_cumprod"),
        (lambda: masked_diffusion_loss(X, prediction_type="sample"), ValueError, "no x0"),
        (lambda: masked_diffusion_loss(X, target=X, noise=X), ValueError, "not both"),
        (lambda: masked_diffusion_loss(X, noise=X, seed=1), ValueError, "either noise or seed"),
        (lambda: masked_diffusion_loss(X, target=X[:1]), ShapeError, "target has shape"),
        (lambda: masked_diffusion_loss(X, target=X, prediction_type="eps"), ValueError, "Known: epsilon, v, sample"),
        (lambda: masked_diffusion_loss(X, target=X, loss="l2"), ValueError, "Known: mse"),
        (lambda: masked_diffusion_loss(X, target=X, normalize="batch"), ValueError, "Known: per_sample"),
        (lambda: masked_diffusion_loss(X, target=X, reduction="max"), ValueError, "Known: mean"),
        (lambda: masked_diffusion_loss(X, target=X, weight="snr"), ValueError, "Give 'min_snr'"),
        (lambda: masked_diffusion_loss(X, target=X, weight="min_snr"), ValueError, "needs t"),
        (lambda: masked_diffusion_loss(X, target=X, weight=torch.ones(3)), ShapeError, "one per sample"),
        (lambda: masked_diffusion_loss(X, target=X, mask=torch.ones(2, 3, 3)), ShapeError, "Resize it to the latents"),
        (lambda: masked_diffusion_loss(X, target=X, loss="huber", delta=0), ValueError, "delta 0"),
        (lambda: q_sample(X, TS, ALPHAS * NAN, seed=1), ValueError, "Give shares of the signal"),
        (lambda: q_sample(X, TS, ALPHAS + 1, seed=1), ValueError, "Give shares of the signal"),
        (lambda: q_sample(X, [0, 1], ALPHAS, seed=1), ShapeError, "t is a list"),
        (lambda: q_sample(X, TS, ALPHAS, seed="7"), TypeError, "seed is a str"),
        (lambda: q_sample(X, TS, ALPHAS, seed=0.5), TypeError, "seed is a float"),
        (lambda: q_sample(X, TS, ALPHAS, seed=1, out=[1]), TypeError, "out is a list"),
        (lambda: q_sample(X, TS, ALPHAS, seed=1, out=X.int()), TypeError, "out is torch.int32"),
        (lambda: q_sample(X, TS, ALPHAS, seed=1, out=X.to("meta")), ValueError, "out is on meta and x0 on cpu"),
        (lambda: q_sample(X, TS, ALPHAS, seed=1, out_dtype=torch.int32), TypeError, "out_dtype torch.int32"),
        (lambda: masked_diffusion_loss(X, target=X, mask=[1]), TypeError, "mask is a list"),
        (lambda: masked_diffusion_loss(X, target=X, mask=MASK * NAN), ValueError, "negative or NaN"),
        (lambda: masked_diffusion_loss(X, target=X, mask=-MASK), ValueError, "negative or NaN"),
        (lambda: masked_diffusion_loss(X, target=X, mask=MASK + 1j), TypeError, "complex"),
        (lambda: masked_diffusion_loss(X, target=X, weight=[1, 2]), TypeError, "weight is a list"),
        (lambda: masked_diffusion_loss(X, target=X, weight=2.0), TypeError, "weight is a float"),
        (lambda: masked_diffusion_loss(X, target=X, weight=torch.tensor([NAN, 1])), ValueError, "not finite"),
        (lambda: masked_diffusion_loss(X, target=X, weight=torch.ones(2, device="meta")), ValueError, "on meta"),
        (lambda: masked_diffusion_loss(X, target=X, weight=torch.ones(2) + 1j), TypeError, "complex"),
        (lambda: masked_diffusion_loss(X, target=X, loss=None), ValueError, "Known: mse"),
        (lambda: masked_diffusion_loss(X, target=X, loss="huber", delta=NAN), ValueError, "delta nan"),
        (
            lambda: masked_diffusion_loss(X, target=X, weight="min_snr", gamma=NAN, t=TS, alphas_cumprod=ALPHAS),
            ValueError,
            "gamma nan",
        ),
        (
            lambda: masked_diffusion_loss(X, target=X, weight="min_snr", gamma=0, t=TS, alphas_cumprod=ALPHAS),
            ValueError,
            "gamma 0",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""The Triton kernels of noising and the loss in Triton's interpreter, against the plain reference."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import masked_diffusion_loss, q_sample

pytestmark = pytest.mark.usefixtures("interpreted")
SHAPE = (3, 4, 17, 19)
ALPHAS = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
TS = torch.tensor([0, 20, 49])


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.04), (torch.float16, 4e-3)])
@pytest.mark.parametrize("given", [True, False])
def test_noising_equals_the_reference(dtype, tolerance, given):
    x0 = made(*SHAPE, dtype=dtype).to(memory_format=torch.channels_last)
    source = {"noise": made(*SHAPE, seed=1, dtype=dtype)} if given else {"seed": 2**40 + 3, "offset": 2}
    ours, noise = q_sample(x0, TS, ALPHAS, backend="triton", **source)
    plain, expected = q_sample(x0, TS, ALPHAS, backend="reference", **source)
    assert ours.dtype == dtype and ours.stride() == plain.stride()
    assert (ours.float() - plain.float()).abs().max() <= tolerance
    assert (noise.float() - expected.float()).abs().max() <= tolerance


MASKS = {
    "none": None,
    "bool": made(3, 1, 17, 19, seed=5) > 0,
    "shared": made(1, 4, 17, 19, seed=6).clamp(min=0),
    "wide": made(3, 4, 17, 19, seed=7).abs(),
    "rows": torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1, 1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("loss", ["mse", "huber", "l1"])
@pytest.mark.parametrize("kind", ["target", "epsilon", "v", "sample", "drawn"])
def test_loss_and_gradient_equal_the_reference(mask, loss, kind):
    settings = {"t": TS, "alphas_cumprod": ALPHAS, "weight": "min_snr", "loss": loss, "delta": 0.5, "mask": MASKS[mask]}
    x0, noise = made(*SHAPE, seed=1), made(*SHAPE, seed=2)
    if kind == "target":
        settings["target"] = x0
    elif kind == "drawn":
        settings |= {"seed": 4, "x0": x0, "prediction_type": "v"}
    else:
        settings |= {"x0": x0, "noise": noise, "prediction_type": kind}
    for normalize, reduction in (("per_sample", "mean"), ("global", "none"), ("numel", "sum")):
        results = []
        for backend in ("triton", "reference"):
            pred = made(*SHAPE).requires_grad_()
            out = masked_diffusion_loss(pred, normalize=normalize, reduction=reduction, backend=backend, **settings)
            (out * torch.tensor([1.0, 2.0, 3.0]) if reduction == "none" else out * 2).sum().backward()
            results.append((out.detach(), pred.grad))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_nan_under_the_mask_leaks_nowhere():
    pred, mask = made(*SHAPE), torch.ones(3, 1, 17, 19)
    mask[0, 0, 3, 3], pred[0, :, 3, 3] = 0, torch.nan
    pred.requires_grad_()
    out = masked_diffusion_loss(pred, target=made(*SHAPE, seed=1), mask=mask, backend="triton")
    out.backward()
    assert out.isfinite() and pred.grad.isfinite().all()


def test_halves_and_runs():
    pred, target = made(*SHAPE, dtype=torch.bfloat16), made(*SHAPE, seed=1, dtype=torch.bfloat16)
    outs = [masked_diffusion_loss(pred, target=target, backend=b) for b in ("triton", "triton", "reference")]
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-5, atol=0)
    with pytest.raises(BackendError, match="float64 is for the reference"):
        masked_diffusion_loss(pred.double(), target=target.double(), backend="triton")


def test_noising_has_its_gradient_whatever_the_backend():
    grads = []
    for backend in ("triton", "reference"):
        x0, noise = (made(*SHAPE, seed=s).requires_grad_() for s in range(2))
        q_sample(x0, TS, ALPHAS, noise=noise, backend=backend)[0].square().sum().backward()
        grads.append((x0.grad, noise.grad))
    torch.testing.assert_close(grads[0], grads[1])

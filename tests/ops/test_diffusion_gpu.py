"""Dtypes and orders of memory of the diffusion kernels on a GPU, against the reference there: pytest -m gpu."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import masked_diffusion_loss, q_sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(8, 4, 64, 64), (3, 3, 17, 19), (2, 4, 1, 1)]


def made(shape, seed, dtype, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
    return x.to(memory_format=layout)


def beside(backend, function):
    """What the backend and the reference give."""
    try:
        return function(backend), function("reference")
    except BackendError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noising_and_loss_equal_the_reference(backend, layout, dtype, shape):
    x0, noise, pred = (made(shape, seed, dtype, layout) for seed in range(3))
    mask = made((shape[0], 1, *shape[2:]), 3, torch.float32, layout).clamp(min=0)
    t, alphas = torch.arange(shape[0], device="cuda"), torch.linspace(0.99, 0.1, 50, device="cuda")

    def step(backend, **source):
        leaf = pred.detach().requires_grad_()
        loss = masked_diffusion_loss(
            leaf, x0=x0, t=t, alphas_cumprod=alphas, prediction_type="v", mask=mask, backend=backend, **source
        )
        (3 * loss).backward()
        return loss.detach(), leaf.grad.float()

    for source in ({"noise": noise}, {"seed": 5}):
        ours, plain = beside(backend, lambda b, source=source: q_sample(x0, t, alphas, backend=b, **source))
        assert ours[0].stride() == plain[0].stride() and ours[1].stride() == plain[1].stride()
        torch.testing.assert_close(ours, plain, rtol=DTYPES[dtype], atol=DTYPES[dtype])
        ours, plain = beside(backend, lambda b, source=source: step(b, **source))
        torch.testing.assert_close(ours, plain, rtol=DTYPES[dtype], atol=DTYPES[dtype])

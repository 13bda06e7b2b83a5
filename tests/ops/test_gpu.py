"""Triton and CUDA kernels on a GPU against the reference there. Deselected unless asked for: pytest -m gpu."""

import pytest
import torch

from poisonshield.errors import BackendError
from poisonshield.ops import jpeg, masked_diffusion_loss, pgd_random_start_, pgd_step_, q_sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BACKENDS = ["triton", "cuda"]


def made(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def on(backend, function):
    try:
        return function(backend)
    except BackendError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [224, 37])  # aligned samples, and others
def test_pgd(backend, norm, dtype, form, size):
    """linf to the bit; in a ball to float32's rounding, or to the next number of half precision."""
    x0, grad = (made(8, 3, size, size, seed=s).to(dtype, memory_format=form) for s in range(2))
    grad -= 0.5
    settings = {"norm": norm, "step_size": 0.01 if norm == "linf" else 1.0, "eps": 0.03 if norm == "linf" else 2.0}
    steps = [on(b, lambda b: pgd_step_(x0.clone(), grad, x0, backend=b, **settings)) for b in (backend, "reference")]
    starts = [
        on(b, lambda b: pgd_random_start_(x0.clone(), x0, eps=settings["eps"], norm=norm, seed=3, backend=b))
        for b in (backend, "reference")
    ]
    near = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for ours, plain in (steps, starts):
        assert torch.equal(ours, plain) if norm == "linf" else (ours - plain).abs().max() <= near


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["linf", "l2", "sign_l2"])
def test_pgd_on_more_samples_than_a_second_grid_axis_holds(backend, norm):
    x0, grad = made(70_000, 5), made(70_000, 5, seed=1) - 0.5
    settings = {"step_size": 0.1, "eps": 0.1, "norm": norm}
    outs = [on(b, lambda b: pgd_step_(x0.clone(), grad, x0, backend=b, **settings)) for b in (backend, "reference")]
    assert (outs[0] - outs[1]).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_the_host_make_no_kernels_and_no_waits(backend):
    """A channels-last step with plain numbers is one kernel, and copies nothing to the device."""
    x0, grad = (made(8, 3, 32, 32, seed=s).to(memory_format=torch.channels_last) for s in range(2))
    x = x0.clone()
    step = lambda b: pgd_step_(x, grad, x0, step_size=0.1, eps=0.1, backend=b)
    on(backend, step)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(backend)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "linf_step" in kernels[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subsampling", ["420", "444"])
def test_jpeg(backend, subsampling):
    x = made(4, 3, 97, 130)
    exact = [
        on(b, lambda b: jpeg(x, 60, subsampling=subsampling, mode="exact", backend=b)) for b in (backend, "reference")
    ]
    assert torch.equal(*exact)
    results = []
    for b in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        out = jpeg(leaf, 60, subsampling=subsampling, rounding="none", backend=b)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    assert (results[0][0] - results[1][0]).abs().max() < 2e-4
    assert (results[0][1] - results[1][1]).abs().max() < 1e-3 * results[1][1].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusion(backend):
    x0, pred, noise = (made(8, 4, 64, 64, seed=s) for s in range(3))
    t, alphas = torch.arange(8).cuda(), torch.linspace(0.99, 0.1, 50).cuda()
    outs = [on(b, lambda b: q_sample(x0, t, alphas, seed=1, backend=b)) for b in (backend, "reference")]
    assert (outs[0][0] - outs[1][0]).abs().max() < 1e-5
    results = []
    for b in (backend, "reference"):
        leaf = pred.clone().requires_grad_()
        loss = masked_diffusion_loss(
            leaf, x0=x0, noise=noise, t=t, alphas_cumprod=alphas, prediction_type="v", backend=b
        )
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_replay_with_new_contents(backend):
    x0, x, grad = made(4, 3, 32, 32), made(4, 3, 32, 32), made(4, 3, 32, 32, seed=1) - 0.5
    eps = torch.full((4,), 0.1, device="cuda")
    step = torch.full((4,), 0.05, device="cuda")
    on(backend, lambda b: pgd_step_(x, grad, x0, step_size=step, eps=eps, backend=b))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pgd_step_(x, grad, x0, step_size=step, eps=eps, backend=backend)
    x.copy_(x0)
    grad.neg_()
    eps.fill_(0.02)
    graph.replay()
    assert torch.equal(x, pgd_step_(x0.clone(), grad, x0, step_size=0.05, eps=0.02, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream(backend):
    x0, grad = made(4, 3, 64, 64), made(4, 3, 64, 64, seed=1) - 0.5
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = on(backend, lambda b: pgd_step_(x0.clone(), grad, x0, step_size=0.1, eps=0.1, backend=b))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, pgd_step_(x0.clone(), grad, x0, step_size=0.1, eps=0.1, backend="reference"))

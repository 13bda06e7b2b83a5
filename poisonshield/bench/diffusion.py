"""Noising and the masked loss beside diffusers' scheduler and the usual eager loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poisonshield.bench.harness import Case, Provider, Target, WrongResult
from poisonshield.ops import masked_diffusion_loss, q_sample
from poisonshield.ops.dispatch import Room

_ROOM = Room("diffusion")


def eager_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over samples of the masked mean square."""
    error = torch.nn.functional.mse_loss(pred, target, reduction="none") * mask
    area = mask.expand_as(pred).flatten(1).sum(1).clamp(min=1)
    return (error.flatten(1).sum(1) / area).mean()


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Noising; loss with its gradient."""
    shape = (2, 4, 8, 8) if quick else (256 if device.type == "cuda" else 64, 4, 64, 64)
    generator = torch.Generator().manual_seed(0)
    x0, noise, pred = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand((shape[0], 1, *shape[2:]), generator=generator) > 0.5).float().to(device)
    t = torch.randint(0, 1000, (shape[0],), generator=generator).to(device)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).float().to(device)
    noising = Case("q_sample", shape, 3 * x0.nbytes, "diffusers")
    loss = Case("masked loss+gradient", shape, 3 * x0.nbytes + mask.nbytes, "eager")
    if device.type == "cuda":
        noising.targets = [Target("cuda", "% copy", 70)]
        loss.targets = [Target("cuda", "% copy", 70), Target("cuda", "eager, torch.compile", 1.3)]
    signal, sigma = (v.view(-1, 1, 1, 1) for v in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
    expected = signal * x0 + sigma * noise

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = pred.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    wanted = gradient(lambda p: eager_loss(p, noise, mask))
    for name in ("reference", "compiled", "triton", "cuda"):
        missing = _ROOM.missing(name, x0.device)

        def sample(name: str = name) -> Tensor:
            return q_sample(x0, t, alphas, noise=noise, backend=name)[0]

        def step(name: str = name) -> Tensor:
            return gradient(lambda p: masked_diffusion_loss(p, target=noise, mask=mask, backend=name))

        noising.providers.append(_provider(name, sample, expected, missing))
        loss.providers.append(_provider(name, step, wanted, missing))
    noising.providers.append(_diffusers(x0, noise, t))
    for name, function in (("eager", eager_loss), ("eager, torch.compile", torch.compile(eager_loss))):

        def theirs(function: Callable[..., Tensor] = function) -> Tensor:
            return gradient(lambda p: function(p, noise, mask))

        loss.providers.append(_provider(name, theirs, wanted))
    return [noising, loss]


def _provider(name: str, run: Callable[[], Tensor], wanted: Tensor, missing: str | None = None) -> Provider:
    """Timed, unless it is missing, and checked against the wanted result."""

    def check() -> str:
        out = run()
        if not torch.allclose(out, wanted, rtol=1e-4, atol=1e-5):
            raise WrongResult(f"{name}: off by {float((out - wanted).abs().max())}")
        return ""

    return Provider(name, None if missing else run, check, missing or "")


def _diffusers(x0: Tensor, noise: Tensor, t: Tensor) -> Provider:
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return Provider("diffusers", None, missing="diffusers is not installed")
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Provider("diffusers", lambda: scheduler.add_noise(x0, noise, t))

"""Noising and the masked diffusion loss in plain PyTorch.

The loss computes its gradient in the same pass: the loss of row b is scale_b * sum(m * l(pred - target)), so the
gradient for pred is scale_b * m * l'(pred - target), and a backward only rescales it. Sums over a row do not depend on
other rows. Sources: Ho et al. 2020 (noising, epsilon), Salimans and Ho 2022 (v), Hang et al. 2023 (min-SNR weights).
"""

import torch
from torch import Tensor

from poisonshield.random import philox_normal


def q_sample(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    noise: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    stream: Tensor,
    return_noise: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise with a = alphas_cumprod[t]; and the noise (empty unless asked for)."""
    dtype = torch.promote_types(x0.dtype, torch.float32)
    noise = drawn(x0, seed, offset, stream).to(x0.dtype) if noise is None else noise
    signal, sigma = levels(t, alphas_cumprod, x0.dim(), dtype)
    out = torch.empty_like(x0, dtype=out_dtype)
    out.copy_(signal * x0.to(dtype) + sigma * noise.to(dtype))
    return out, noise.clone() if return_noise else x0.new_empty(0)


def q_sample_backward(
    grad: Tensor, t: Tensor, alphas_cumprod: Tensor, x0_dtype: torch.dtype, noise_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients for x0 and the noise."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    signal, sigma = levels(t, alphas_cumprod, grad.dim(), dtype)
    return (signal * grad.to(dtype)).to(x0_dtype), (sigma * grad.to(dtype)).to(noise_dtype)


def diffusion_loss(
    pred: Tensor,
    target: Tensor | None,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor | None,
    alphas_cumprod: Tensor | None,
    prediction_type: str,
    seed: Tensor,
    offset: Tensor,
    stream: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    loss: str,
    delta: float,
    normalise: str,
    pred_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [B], weighted and normalised so that their sum is the mean, and d(their sum)/d pred (empty unless asked).

    weight [B] multiplies rows; gamma > 0 multiplies by min-SNR weights. The target is given, or formed from x0, noise
    (or its seed), t and alphas_cumprod.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    if target is None:
        target = formed(pred, x0, noise, t, alphas_cumprod, prediction_type, seed, offset, stream)
    residual = pred.to(dtype) - target.to(dtype)
    scale = row_scale(pred, t, alphas_cumprod, prediction_type, mask, weight, gamma, normalise, dtype)
    value, slope = _penalty(residual, loss, delta)
    if mask is not None:
        # Selected, not multiplied by 0, so that NaN under the mask stays there.
        value, slope = (torch.where(mask != 0, v * mask.to(dtype), 0.0) for v in (value, slope))
    losses = value.flatten(1).sum(1) * scale
    if not pred_grad:
        return losses, pred.new_empty(0)
    rows = scale.view(-1, *[1] * (pred.dim() - 1))
    return losses, torch.empty_like(pred).copy_(slope * rows)


def formed(
    pred: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor | None,
    alphas_cumprod: Tensor | None,
    prediction_type: str,
    seed: Tensor,
    offset: Tensor,
    stream: Tensor,
) -> Tensor:
    """What the network should have said, in at least float32: the noise, v = sqrt(a) noise - sqrt(1 - a) x0, or x0."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    if prediction_type == "sample":
        return x0.to(dtype)
    noise = (drawn(pred, seed, offset, stream).to(pred.dtype) if noise is None else noise).to(dtype)
    if prediction_type == "epsilon":
        return noise
    signal, sigma = levels(t, alphas_cumprod, pred.dim(), dtype)
    return signal * noise - sigma * x0.to(dtype)


def row_scale(
    pred: Tensor,
    t: Tensor | None,
    alphas_cumprod: Tensor | None,
    prediction_type: str,
    mask: Tensor | None,
    weight: Tensor | None,
    gamma: float,
    normalise: str,
    dtype: torch.dtype,
) -> Tensor:
    """[B]: weight over normaliser, as if the reduction were a sum over rows."""
    b, each = len(pred), max(1, pred[:1].numel())
    if normalise == "numel":
        size = pred.new_full((b,), each * max(1, b), dtype=dtype)
    else:
        if mask is None:
            area = pred.new_full((b,), each, dtype=dtype)
        else:
            area = mask.to(dtype).expand(pred.shape).flatten(1).sum(1)
        size = area.clamp(min=1) * max(1, b) if normalise == "per_sample" else area.sum().clamp(min=1).expand(b)
    scale = 1 / size
    if weight is not None:
        scale = scale * weight.to(dtype)
    if gamma > 0:
        scale = scale * min_snr(alphas_cumprod[t].to(dtype), gamma, prediction_type)
    return scale


def min_snr(alpha: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(snr, gamma) over snr (epsilon), snr + 1 (v) or 1 (sample), snr = alpha / (1 - alpha), with its limits.

    At alpha = 0 the epsilon weight is 1; at alpha = 1 the snr is infinite: 0 for epsilon and v, gamma for sample.
    Written without dividing by zero: min(snr, gamma) = min(alpha, gamma (1 - alpha)) / (1 - alpha).
    """
    noise = 1 - alpha
    low = torch.minimum(alpha, gamma * noise)  # min(snr, gamma) * (1 - alpha)
    if prediction_type == "epsilon":
        return torch.where(alpha > 0, low / alpha.where(alpha > 0, 1.0), 1.0)
    if prediction_type == "v":
        return low  # snr + 1 = 1 / (1 - alpha)
    return torch.where(noise > 0, low / noise.where(noise > 0, 1.0), gamma)


def drawn(like: Tensor, seed: Tensor, offset: Tensor, stream: Tensor) -> Tensor:
    """Standard normal float32 of the shape of `like`: row b is a function of (seed, offset, stream, b) alone."""
    ids = torch.arange(len(like), device=like.device)
    count = like[:1].numel() if len(like) else 0
    return philox_normal(count, seed=seed, ids=ids, offset=offset, stream=stream).view(like.shape)


def levels(t: Tensor, alphas_cumprod: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) of each row, [B, 1, ...]."""
    a = alphas_cumprod[t].to(dtype).view(-1, *[1] * (dim - 1))
    return a.sqrt(), (1 - a).sqrt()


def _penalty(residual: Tensor, loss: str, delta: float) -> tuple[Tensor, Tensor]:
    """The loss of each element and its derivative. huber: quadratic r^2 / 2 up to delta, then linear."""
    if loss == "mse":
        return residual.square(), 2 * residual
    if loss == "l1":
        return residual.abs(), residual.sign()
    size = residual.abs()
    value = torch.where(size <= delta, 0.5 * residual.square(), delta * (size - 0.5 * delta))
    return value, residual.clamp(-delta, delta)

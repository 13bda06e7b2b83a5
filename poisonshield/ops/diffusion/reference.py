"""Noising and the masked diffusion loss in plain PyTorch.

The loss computes its gradient in the same pass: the loss of row b is scale_b * sum(m * l(pred - target)), so the
gradient for pred is scale_b * m * l'(pred - target), and a backward only rescales it. Sums over a row do not depend on
other rows. Sources: Ho et al. 2020 (noising, epsilon), Salimans and Ho 2022 (v), Hang et al. 2023 (min-SNR weights).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poisonshield.random import philox_normal, philox_uniform


class NoisingArguments(NamedTuple):
    """What `q_sample` takes."""

    x0: Tensor  # [B, C, ...], clean pixels or latents
    t: Tensor  # int64 [B], timesteps
    alphas_cumprod: Tensor  # [T], in [0, 1]
    noise: Tensor | None  # [B, C, ...]; None: drawn from the next three
    seed: Tensor  # int64 []: where in Philox's numbers the noise lies, as are the next two
    offset: Tensor  # int64 []
    stream: Tensor  # int64 []
    return_noise: bool  # whether the second output is the noise or empty
    out_dtype: torch.dtype  # of x_t


class NoisingGradientArguments(NamedTuple):
    """What `q_sample_backward` takes."""

    grad: Tensor  # [B, C, ...], d loss/d x_t
    t: Tensor  # int64 [B]
    alphas_cumprod: Tensor  # [T]
    x0_dtype: torch.dtype  # of the gradient for x0
    noise_dtype: torch.dtype  # of the gradient for the noise


class LossArguments(NamedTuple):
    """What `diffusion_loss` takes: a prediction, its target or what forms it, and what each element counts."""

    pred: Tensor  # [B, C, ...]
    target: Tensor | None  # [B, C, ...]; None: formed from the next eight
    x0: Tensor | None  # [B, C, ...]
    noise: Tensor | None  # [B, C, ...]; None: drawn from seed, offset and stream
    t: Tensor | None  # int64 [B]
    alphas_cumprod: Tensor | None  # [T], in [0, 1]
    prediction_type: str  # "epsilon", "v" or "sample": what the network says
    seed: Tensor  # int64 []
    offset: Tensor  # int64 []
    stream: Tensor  # int64 []
    mask: Tensor | None  # broadcastable to pred: weight of each element
    weight: Tensor | None  # [B], of each row
    gamma: float  # of min-SNR weights; 0: none of them
    loss: str  # "mse", "huber" or "l1"
    delta: float  # where huber turns linear
    normalize: str  # "per_sample", "global" or "numel": what sums are divided by
    pred_grad: bool  # whether the second output is the gradient or empty


def q_sample(args: NoisingArguments) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise with a = alphas_cumprod[t]; and the noise (empty unless asked for)."""
    x0, dtype = args.x0, torch.promote_types(args.x0.dtype, torch.float32)
    noise = drawn(x0, args).to(x0.dtype) if args.noise is None else args.noise
    signal, sigma = levels(args.t, args.alphas_cumprod, x0.dim(), dtype)
    out = torch.empty_like(x0, dtype=args.out_dtype)
    torch.add(signal * x0.to(dtype), sigma * noise.to(dtype), out=out)
    return out, torch.empty_like(x0).copy_(noise) if args.return_noise else x0.new_empty(0)


def q_sample_backward(args: NoisingGradientArguments) -> tuple[Tensor, Tensor]:
    """Gradients for x0 and the noise, each [B, C, ...]."""
    dtype = torch.promote_types(args.grad.dtype, torch.float32)
    signal, sigma = levels(args.t, args.alphas_cumprod, args.grad.dim(), dtype)
    grad = args.grad.to(dtype)
    return (signal * grad).to(args.x0_dtype), (sigma * grad).to(args.noise_dtype)


def diffusion_loss(args: LossArguments) -> tuple[Tensor, Tensor]:
    """Losses [B], weighted and normalized so that their sum is the mean; and d(sum)/d pred, empty unless asked for."""
    pred, mask, dtype = args.pred, args.mask, torch.promote_types(args.pred.dtype, torch.float32)
    target = form_target(args) if args.target is None else args.target
    residual = pred.to(dtype) - target.to(dtype)
    scale = row_scale(args, dtype)
    value, slope = _penalty(residual, args.loss, args.delta)
    if mask is not None:
        # Selected, not multiplied by 0, so that NaN under the mask stays there.
        inside, weights = mask != 0, mask.to(dtype)
        value, slope = (torch.where(inside, v * weights, 0.0) for v in (value, slope))
    losses = value.flatten(1).sum(1) * scale  # [B]
    if not args.pred_grad:
        return losses, pred.new_empty(0)
    rows = scale.view(-1, *[1] * (pred.dim() - 1))  # [B, 1, ...]
    return losses, torch.mul(slope, rows, out=torch.empty_like(pred))


def form_target(args: LossArguments) -> Tensor:
    """What the network should have said, in at least float32: the noise, v = sqrt(a) noise - sqrt(1 - a) x0, or x0."""
    pred, dtype = args.pred, torch.promote_types(args.pred.dtype, torch.float32)
    if args.prediction_type == "sample":
        return _given(args.x0).to(dtype)
    noise = (drawn(pred, args).to(pred.dtype) if args.noise is None else args.noise).to(dtype)
    if args.prediction_type == "epsilon":
        return noise
    signal, sigma = levels(_given(args.t), _given(args.alphas_cumprod), pred.dim(), dtype)
    return signal * noise - sigma * _given(args.x0).to(dtype)


def row_scale(args: LossArguments, dtype: torch.dtype) -> Tensor:
    """[B]: weight over normalizer, as if the reduction were a sum over rows."""
    scale = 1 / _normalizer(args, dtype)
    if args.weight is not None:
        scale = scale * args.weight.to(dtype)
    if args.gamma > 0:
        alpha = _given(args.alphas_cumprod)[_given(args.t)].to(dtype)  # [B]
        scale = scale * min_snr(alpha, args.gamma, args.prediction_type)
    return scale


def _normalizer(args: LossArguments, dtype: torch.dtype) -> Tensor:
    """[B]: what a row's sum is divided by."""
    pred = args.pred
    b, each = len(pred), max(1, pred[:1].numel())
    if args.normalize == "numel":
        return pred.new_full((b,), each * max(1, b), dtype=dtype)
    if args.mask is None:
        area = pred.new_full((b,), each, dtype=dtype)
    else:
        repeats = each // max(1, args.mask[:1].numel())  # of each entry within a row
        area = (args.mask.to(dtype).flatten(1).sum(1) * repeats).expand(b)  # [B]
    if args.normalize == "per_sample":
        return area.clamp(min=1) * max(1, b)
    return area.sum().clamp(min=1).expand(b)


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


def drawn(like: Tensor, args: NoisingArguments | LossArguments) -> Tensor:
    """Standard normal float32 of the shape of `like`: row b is a function of (seed, offset, stream, b) alone."""
    ids = torch.arange(len(like), device=like.device)
    count = like[:1].numel() if len(like) else 0
    noise = philox_normal(count, seed=args.seed, ids=ids, offset=args.offset, stream=args.stream)  # [B, count]
    return noise.view(like.shape)


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


def _given(value: Tensor | None) -> Tensor:
    """A tensor that the public function has made sure of."""
    assert value is not None
    return value


def examples() -> dict[str, list[Any]]:
    """Calls that the contract tests make of each op on every backend."""
    shape = (2, 3, 17, 9)
    a, b, c = (philox_uniform(shape, seed) * 0.8 + 0.1 for seed in range(3))
    t, alphas, mask = torch.tensor([3, 11]), torch.linspace(0.99, 0.1, 20), philox_uniform((2, 1, 17, 9), 3) + 0.1
    seed, offset, stream = (torch.tensor(i) for i in (5, 0, 1))
    noising = NoisingArguments(
        x0=a.clone().requires_grad_(), t=t, alphas_cumprod=alphas, noise=b.clone().requires_grad_(), seed=seed,
        offset=offset, stream=stream, return_noise=False, out_dtype=torch.float32,
    )  # fmt: skip
    given = LossArguments(
        pred=a, target=b, x0=None, noise=None, t=None, alphas_cumprod=None, prediction_type="epsilon", seed=seed,
        offset=offset, stream=stream, mask=None, weight=None, gamma=0.0, loss="mse", delta=1.0, normalize="numel",
        pred_grad=False,
    )  # fmt: skip
    formed_from_v = given._replace(
        pred=a.clone().requires_grad_(), target=None, x0=b, noise=c, t=t, alphas_cumprod=alphas, prediction_type="v",
        mask=mask, weight=torch.tensor([0.1, 0.2]), gamma=5.0, loss="huber", delta=0.3, normalize="global",
        pred_grad=True,
    )  # fmt: skip
    return {
        "q_sample": [noising, noising._replace(noise=None, return_noise=True)],
        "q_sample_backward": [NoisingGradientArguments(a, t, alphas, torch.float32, torch.float32)],
        "diffusion_loss": [formed_from_v, given],
    }

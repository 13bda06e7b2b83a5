"""Diffusion training on a part of the picture: `q_sample` (noising) and `masked_diffusion_loss`.

The loss forms its target, masks, weights and normalises, and computes the gradient for the prediction in the same pass.
Gradients also reach x0, noise and target where asked for, which poisons need.
"""

from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.library import register

__all__ = ["masked_diffusion_loss", "q_sample"]

PREDICTIONS = ("epsilon", "v", "sample")
LOSSES = ("mse", "huber", "l1")
NORMALISERS = ("per_sample", "global", "numel")
REDUCTIONS = ("mean", "sum", "none")
_STREAM = 0x64696666  # "diff": where noise regenerated from a seed lies


def q_sample(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_noise: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(x_t, noise): x_t = sqrt(a) x0 + sqrt(1 - a) noise with a = alphas_cumprod[t], and the noise if return_noise.

    x0 [B, C, *spatial] float; t int64 [B]; alphas_cumprod [T] in [0, 1]. noise of x0's shape, or drawn from `seed` (an
    int, or one int64 on the device): row b depends on (seed, offset, b) alone, and `masked_diffusion_loss` draws the
    same again. out: written in place instead of a new tensor (not under gradients). Computed in at least float32.
    Differentiable in x0 and noise. Raises TypeError, ShapeError, ValueError.
    """
    _check_float(x0, "x0")
    _check_t(x0, t, alphas_cumprod)
    if (noise is None) == (seed is None):
        raise ValueError("give either noise or seed.")
    if noise is not None:
        _check_like(x0, noise, "noise")
    dtype = x0.dtype if out_dtype is None else out_dtype
    numbers = _numbers(x0, seed, offset)
    x_t, drawn = _q_sample(
        x0, t, alphas_cumprod, noise, *numbers, return_noise and noise is None, dtype, dispatch.requested(backend)
    )
    if out is not None:
        if out.shape != x_t.shape:
            raise ShapeError(f"out has shape {tuple(out.shape)} and x0 {tuple(x0.shape)}. They must be equal.")
        if torch.is_grad_enabled() and x_t.requires_grad:
            raise ValueError("out= cannot carry gradients. Leave it out, or call under torch.no_grad().")
        x_t = out.copy_(x_t)
    if not return_noise:
        return x_t, None
    return x_t, drawn.detach() if noise is None else noise


def masked_diffusion_loss(
    pred: Tensor,
    *,
    target: Tensor | None = None,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
    alphas_cumprod: Tensor | None = None,
    prediction_type: str = "epsilon",
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    mask: Tensor | None = None,
    weight: Tensor | str | None = None,
    gamma: float = 5.0,
    loss: str = "mse",
    delta: float = 1.0,
    normalise: str = "per_sample",
    reduction: str = "mean",
    grad_target: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The loss of pred against target over the mask: float32 (float64 of float64), a scalar, or [B] for "none".

    pred [B, C, *spatial]. target of that shape, or formed from noise (or the `seed` that drew it), x0, t [B] and
    alphas_cumprod [T]: "epsilon" the noise, "v" sqrt(a) noise - sqrt(1-a) x0, "sample" x0.
    mask, broadcastable to pred, float or bool: weights of pixels; where 0, pred may even be NaN. weight: [B], or
    "min_snr" with gamma (Hang et al. 2023; needs t and alphas_cumprod). loss: "mse", "huber" (delta), "l1".

    With S_b the masked sum of row b and A_b the sum of its mask (over channels too), "per_sample" gives
    mean_b w_b S_b / max(A_b, 1); "global" sum_b w_b S_b / max(sum A, 1); "numel" sum_b w_b S_b / pred.numel(). An empty
    mask or batch gives 0. reduction "sum" leaves out the 1/B of per_sample and of numel, and equals "mean" for global;
    "none" gives the terms of that sum, each row by itself (global: over the common area).

    Gradients reach pred; with grad_target also target, x0 and noise, whichever require them. No second derivatives.
    Raises TypeError, ShapeError, ValueError. t on a CUDA device is not checked.
    """
    _check_float(pred, "pred")
    for name, value, known in (
        ("prediction_type", prediction_type, PREDICTIONS),
        ("loss", loss, LOSSES),
        ("normalise", normalise, NORMALISERS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown. Known: {', '.join(known)}")
    _check_target(pred, target, x0, noise, t, alphas_cumprod, prediction_type, seed)
    if mask is not None:
        _check_mask(pred, mask)
    if isinstance(weight, str):
        if weight != "min_snr":
            raise ValueError(f"weight {weight!r} is unknown. Give 'min_snr' or a tensor [{len(pred)}].")
        if t is None or alphas_cumprod is None:
            raise ValueError("weight='min_snr' needs t and alphas_cumprod.")
        if not gamma > 0:
            raise ValueError(f"gamma {gamma} must be positive.")
    elif weight is not None and weight.shape != (len(pred),):
        raise ShapeError(f"weight has shape {tuple(weight.shape)}. Give [{len(pred)}], one per sample.")
    if loss == "huber" and not delta > 0:
        raise ValueError(f"delta {delta} must be positive.")
    min_snr = isinstance(weight, str)
    sources = (
        (target, x0, noise)
        if grad_target
        else tuple(v.detach() if v is not None else None for v in (target, x0, noise))
    )
    losses, _ = _diffusion_loss(
        pred, *sources, t, alphas_cumprod, prediction_type, *_numbers(pred, seed, offset), mask,
        None if min_snr else weight, float(gamma) if min_snr else 0.0, loss, float(delta), normalise,
        torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (pred, *sources)),
        dispatch.requested(backend),
    )  # fmt: skip
    # The op's losses sum to the mean.
    if reduction != "mean" and normalise != "global":
        losses = losses * len(pred)
    return losses if reduction == "none" else losses.sum()


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} is {_kind(x)}. Give a float tensor [B, C, ...].")
    if x.dim() < 2:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}. Give a batch [B, C, ...].")


def _check_like(x: Tensor, other: Tensor, name: str) -> None:
    _check_float(other, name)
    if other.shape != x.shape:
        raise ShapeError(f"{name} has shape {tuple(other.shape)}, and {tuple(x.shape)} is needed.")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}, and {x.device} is needed. Move one of them.")


def _check_t(x: Tensor, t: Tensor | None, alphas_cumprod: Tensor | None) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != (len(x),):
        raise ShapeError(f"t is {_kind(t)}. Give int64 [{len(x)}], a timestep per sample.")
    if not isinstance(alphas_cumprod, Tensor) or not alphas_cumprod.is_floating_point() or alphas_cumprod.dim() != 1:
        raise ShapeError(f"alphas_cumprod is {_kind(alphas_cumprod)}. Give floats [T], as a scheduler has them.")
    for value, name in ((t, "t"), (alphas_cumprod, "alphas_cumprod")):
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, and {x.device} is needed. Move one of them.")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and len(t):
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= len(alphas_cumprod):
            raise ValueError(f"t reaches from {low} to {high}, and alphas_cumprod has 0..{len(alphas_cumprod) - 1}.")


def _check_target(
    pred: Tensor,
    target: Tensor | None,
    x0: Tensor | None,
    noise: Tensor | None,
    t: Tensor | None,
    alphas_cumprod: Tensor | None,
    prediction_type: str,
    seed: int | Tensor | None,
) -> None:
    for value, name in ((target, "target"), (x0, "x0"), (noise, "noise")):
        if value is not None:
            _check_like(pred, value, name)
    if t is not None or alphas_cumprod is not None:
        _check_t(pred, t, alphas_cumprod)
    if target is not None:
        if x0 is not None or noise is not None or seed is not None:
            raise ValueError("give either target, or x0, noise and seed to form it from; not both.")
        return
    if noise is not None and seed is not None:
        raise ValueError("give either noise or seed.")
    missing = []
    if prediction_type != "epsilon" and x0 is None:
        missing.append("x0")
    if prediction_type != "sample" and noise is None and seed is None:
        missing.append("noise or seed")
    if prediction_type == "v" and t is None:
        missing.append("t and alphas_cumprod")
    if missing:
        raise ValueError(f"no target, and to form that of {prediction_type!r} there is no {', no '.join(missing)}.")


def _check_mask(pred: Tensor, mask: Tensor) -> None:
    if mask.is_complex() or mask.device != pred.device:
        raise ValueError(f"mask is {_kind(mask)} on {mask.device}. Give floats or bools on {pred.device}.")
    if mask.dim() != pred.dim() or any(m not in (1, n) for m, n in zip(mask.shape, pred.shape, strict=True)):
        raise ShapeError(
            f"mask {tuple(mask.shape)} does not broadcast to pred {tuple(pred.shape)}. Resize it to the latents first."
        )


def _numbers(x: Tensor, seed: int | Tensor | None, offset: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = []
    for value, name in ((0 if seed is None else seed, "seed"), (offset, "offset"), (_STREAM, "stream")):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.numel() != 1 or value.device != x.device:
                raise ShapeError(f"{name} is {_kind(value)}. Give an integer, or one int64 on {x.device}.")
            values.append(value.reshape(()))
        else:
            values.append(torch.full((), ((value + 2**63) % 2**64) - 2**63, dtype=torch.int64, device=x.device))
    return values[0], values[1], values[2]


def _setup_q_sample(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, t, alphas_cumprod, noise = inputs[:4]
    ctx.save_for_backward(t, alphas_cumprod)
    ctx.dtypes = x0.dtype, x0.dtype if noise is None else noise.dtype


def _backward_q_sample(ctx: Any, grad: Tensor, grad_noise: Tensor | None) -> tuple[Any, ...]:
    # Two products: no kernel does them better, whatever backend the forward asked for.
    dx0, dnoise = _q_sample_backward(grad, *ctx.saved_tensors, *ctx.dtypes, "reference")
    return dx0, None, None, dnoise if ctx.needs_input_grad[3] else None, *[None] * 6


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    target, x0, noise, t, alphas_cumprod = inputs[1:6]
    ctx.prediction_type = inputs[6]
    ctx.dtypes = tuple(None if v is None else v.dtype for v in (target, x0, noise))
    ctx.save_for_backward(output[1], t, alphas_cumprod)


def _backward_loss(ctx: Any, grad: Tensor, grad_pred: Tensor | None) -> tuple[Any, ...]:
    """d loss/d pred times the row's upstream gradient; the target's is its negative, chained to what formed it."""
    saved, t, alphas_cumprod = ctx.saved_tensors
    rows = grad.view(-1, *[1] * (saved.dim() - 1))
    by_pred = saved * rows.to(saved.dtype)
    target, x0, noise = ctx.dtypes
    needs = ctx.needs_input_grad
    out: list[Tensor | None] = [by_pred, None, None, None]
    if needs[1]:
        out[1] = -by_pred.to(target)
    if needs[2] and ctx.prediction_type != "epsilon":
        sigma = 1.0
        if ctx.prediction_type == "v":
            sigma = -(1 - alphas_cumprod[t].to(grad.dtype).view_as(rows)).sqrt()
        out[2] = -(by_pred * sigma).to(x0)
    if needs[3] and ctx.prediction_type != "sample":
        signal = alphas_cumprod[t].to(grad.dtype).view_as(rows).sqrt() if ctx.prediction_type == "v" else 1.0
        out[3] = -(by_pred * signal).to(noise)
    return *out, *[None] * 14


_room = dispatch.Room("diffusion")
_q_sample_backward = register(
    "q_sample_backward(Tensor grad, Tensor t, Tensor alphas_cumprod, ScalarType x0_dtype, ScalarType noise_dtype, "
    "str backend) -> (Tensor, Tensor)",
    _room,
    fake=lambda grad, t, a, x0, noise, backend: (torch.empty_like(grad, dtype=x0), torch.empty_like(grad, dtype=noise)),
)
_q_sample = register(
    "q_sample(Tensor x0, Tensor t, Tensor alphas_cumprod, Tensor? noise, Tensor seed, Tensor offset, Tensor stream, "
    "bool return_noise, ScalarType out_dtype, str backend) -> (Tensor, Tensor)",
    _room,
    fake=lambda x0, t, a, noise, seed, offset, stream, return_noise, dtype, backend: (
        torch.empty_like(x0, dtype=dtype),
        x0.new_empty(x0.shape) if return_noise else x0.new_empty(0),
    ),
    setup_context=_setup_q_sample,
    backward=_backward_q_sample,
)
_diffusion_loss = register(
    "diffusion_loss(Tensor pred, Tensor? target, Tensor? x0, Tensor? noise, Tensor? t, Tensor? alphas_cumprod, "
    "str prediction_type, Tensor seed, Tensor offset, Tensor stream, Tensor? mask, Tensor? weight, float gamma, "
    "str loss, float delta, str normalise, bool pred_grad, str backend) -> (Tensor, Tensor)",
    _room,
    fake=lambda pred, *rest: (
        pred.new_empty(len(pred), dtype=torch.promote_types(pred.dtype, torch.float32)),
        torch.empty_like(pred) if rest[-2] else pred.new_empty(0),
    ),
    setup_context=_setup_loss,
    backward=_backward_loss,
)

"""Diffusion training on a part of the picture: `q_sample` (noising) and `masked_diffusion_loss`.

The loss forms its target, masks, weights and normalizes, and computes the gradient for the prediction in the same pass.
Gradients also reach x0, noise and target where asked for, which poisons need.
"""

from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.check import (
    check_choice,
    check_device,
    check_floats,
    check_number,
    check_out_dtype,
    check_tensor,
    check_without_gradient,
    kind,
    readable,
    word,
)
from poisonshield.ops.diffusion.reference import LossArguments, NoisingArguments, NoisingGradientArguments
from poisonshield.ops.library import Op, first_derivative

__all__ = ["masked_diffusion_loss", "q_sample"]

PREDICTIONS = ("epsilon", "v", "sample")
LOSSES = ("mse", "huber", "l1")
NORMALIZERS = ("per_sample", "global", "numel")
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
    Differentiable in x0 and noise. Raises TypeError, ShapeError, ValueError, GradientError (alphas_cumprod requires
    gradients).
    """
    _check_float(x0, "x0")
    _check_t(x0, t, alphas_cumprod, "x0")
    _check_out(x0, out)
    check_out_dtype(out_dtype)
    if (noise is None) == (seed is None):
        raise ValueError("give either noise or seed.")
    if noise is not None:
        _check_like(x0, noise, "noise", "x0")
    check_without_gradient(alphas_cumprod=alphas_cumprod)
    place = _place(x0, seed, offset)
    arguments = NoisingArguments(
        x0=x0,
        t=t,
        alphas_cumprod=alphas_cumprod,
        noise=noise,
        seed=place[0],
        offset=place[1],
        stream=place[2],
        return_noise=return_noise and noise is None,
        out_dtype=x0.dtype if out_dtype is None else out_dtype,
    )
    x_t, drawn = _q_sample(arguments, dispatch.requested(backend))
    if out is not None:
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
    normalize: str = "per_sample",
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

    Gradients reach pred; with grad_target also target, x0 and noise, whichever require them. Raises TypeError,
    ShapeError, ValueError; GradientError if mask, weight or alphas_cumprod requires gradients, and where a second
    derivative is taken. t on a CUDA device is not checked.
    """
    _check_float(pred, "pred")
    for name, value, known in (
        ("prediction_type", prediction_type, PREDICTIONS),
        ("loss", loss, LOSSES),
        ("normalize", normalize, NORMALIZERS),
        ("reduction", reduction, REDUCTIONS),
    ):
        check_choice(name, value, known)
    _check_target(pred, target, x0, noise, t, alphas_cumprod, prediction_type, seed)
    if mask is not None:
        _check_mask(pred, mask)
    _check_weight(pred, weight, gamma, t, alphas_cumprod)
    if loss == "huber":
        check_number("delta", delta, above=0, infinite=True)
    weights = None if isinstance(weight, str) else weight
    check_without_gradient(mask=mask, weight=weights, alphas_cumprod=alphas_cumprod)
    if not grad_target:
        target, x0, noise = (None if v is None else v.detach() for v in (target, x0, noise))
    place = _place(pred, seed, offset)
    arguments = LossArguments(
        pred=pred,
        target=target,
        x0=x0,
        noise=noise,
        t=t,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        seed=place[0],
        offset=place[1],
        stream=place[2],
        mask=mask,
        weight=weights,
        gamma=float(gamma) if isinstance(weight, str) else 0.0,
        loss=loss,
        delta=float(delta),
        normalize=normalize,
        pred_grad=torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (pred, target, x0, noise)),
    )
    losses, _ = _diffusion_loss(arguments, dispatch.requested(backend))
    # The op's losses sum to the mean.
    if reduction != "mean" and normalize != "global":
        losses = losses * pred.shape[0]
    return losses if reduction == "none" else losses.sum()


def _place(x: Tensor, seed: int | Tensor | None, offset: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(seed, offset, stream) on the device of x: where in Philox's numbers noise lies; unwritten if none is drawn."""
    if seed is None:
        return (x.new_empty((), dtype=torch.int64),) * 3
    return word(x, seed, "seed"), word(x, offset, "offset"), word(x, _STREAM, "stream")


def _check_float(x: Tensor, name: str) -> None:
    check_floats(name, x, "a float tensor [B, C, ...]")
    if x.dim() < 2:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}. Give a batch [B, C, ...].")


def _check_like(x: Tensor, other: Tensor, name: str, owner: str) -> None:
    _check_float(other, name)
    if other.shape != x.shape:
        raise ShapeError(f"{name} has shape {tuple(other.shape)}, and {tuple(x.shape)} is needed.")
    check_device(x, other, name, owner=owner)


def _check_t(x: Tensor, t: Tensor | None, alphas_cumprod: Tensor | None, owner: str) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        raise ShapeError(f"t is {kind(t)}. Give int64 [{x.shape[0]}], a timestep per sample.")
    if not isinstance(alphas_cumprod, Tensor) or not alphas_cumprod.is_floating_point() or alphas_cumprod.dim() != 1:
        raise ShapeError(f"alphas_cumprod is {kind(alphas_cumprod)}. Give floats [T], as a scheduler has them.")
    check_device(x, t, "t", owner=owner)
    check_device(x, alphas_cumprod, "alphas_cumprod", owner=owner)
    steps = alphas_cumprod.shape[0]
    if readable(t) and t.shape[0]:
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= steps:
            raise ConfigError(f"t reaches from {low} to {high}, and alphas_cumprod has 0..{steps - 1}.")
    if readable(alphas_cumprod) and steps:
        least, most = (float(v) for v in alphas_cumprod.detach().aminmax())
        if not (least >= 0 and most <= 1):
            raise ConfigError(f"alphas_cumprod reaches from {least} to {most}. Give shares of the signal, in [0, 1].")


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
            _check_like(pred, value, name, "pred")
    if t is not None or alphas_cumprod is not None:
        _check_t(pred, t, alphas_cumprod, "pred")
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
    check_tensor("mask", mask, "floats or bools")
    check_device(pred, mask, "mask", owner="pred")
    if mask.dim() != pred.dim() or any(m not in (1, n) for m, n in zip(mask.shape, pred.shape, strict=True)):
        raise ShapeError(
            f"mask {tuple(mask.shape)} does not broadcast to pred {tuple(pred.shape)}. Resize it to the latents first."
        )
    if readable(mask) and mask.is_floating_point() and not bool((mask >= 0).all()):
        raise ConfigError("mask has a negative or NaN entry. Give what each pixel counts, 0 for not at all.")


def _check_weight(
    pred: Tensor, weight: Tensor | str | None, gamma: float, t: Tensor | None, alphas_cumprod: Tensor | None
) -> None:
    if weight is None:
        return
    if isinstance(weight, str):
        if weight != "min_snr":
            raise ConfigError(f"weight {weight!r} is unknown. Give 'min_snr' or a tensor [{pred.shape[0]}].")
        if t is None or alphas_cumprod is None:
            raise ConfigError("weight='min_snr' needs t and alphas_cumprod.")
        check_number("gamma", gamma, above=0)
        return
    check_tensor("weight", weight, f"'min_snr' or a tensor [{pred.shape[0]}]")
    if weight.shape != pred.shape[:1]:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}. Give [{pred.shape[0]}], one per sample.")
    check_device(pred, weight, "weight", owner="pred")
    if readable(weight) and not bool(weight.isfinite().all()):
        raise ConfigError(f"weight {weight.tolist()} is not finite.")


def _check_out(x0: Tensor, out: Tensor | None) -> None:
    if out is None:
        return
    check_floats("out", out, "a float tensor of the shape of x0")
    if out.shape != x0.shape:
        raise ShapeError(f"out has shape {tuple(out.shape)} and x0 {tuple(x0.shape)}. They must be equal.")
    check_device(x0, out, "out", owner="x0")


def _noising_fake(args: NoisingArguments) -> tuple[Tensor, Tensor]:
    kept = torch.empty_like(args.x0) if args.return_noise else args.x0.new_empty(0)
    return torch.empty_like(args.x0, dtype=args.out_dtype), kept


def _noising_save(ctx: Any, args: NoisingArguments, output: Any) -> None:
    ctx.set_materialize_grads(False)  # else torch fills a tensor with zeros for the output that nobody differentiates
    ctx.save_for_backward(args.t, args.alphas_cumprod)
    ctx.dtypes = args.x0.dtype, args.x0.dtype if args.noise is None else args.noise.dtype


def _noising_gradients(
    ctx: Any, wanted: Any, grad: Tensor | None, grad_noise: Tensor | None
) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    # Two products: no kernel does them better, whatever backend the forward asked for.
    dx0, dnoise = _q_sample_backward(NoisingGradientArguments(grad, *ctx.saved_tensors, *ctx.dtypes), "reference")
    return {"x0": dx0, "noise": dnoise if wanted.noise else None}


def _noising_gradient_fake(args: NoisingGradientArguments) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args.grad, dtype=args.x0_dtype), torch.empty_like(args.grad, dtype=args.noise_dtype)


def _loss_fake(args: LossArguments) -> tuple[Tensor, Tensor]:
    pred = args.pred
    losses = pred.new_empty(pred.shape[0], dtype=torch.promote_types(pred.dtype, torch.float32))
    return losses, torch.empty_like(pred) if args.pred_grad else pred.new_empty(0)


def _loss_save(ctx: Any, args: LossArguments, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # as above
    ctx.prediction_type = args.prediction_type
    ctx.dtypes = tuple(None if v is None else v.dtype for v in (args.target, args.x0, args.noise))
    ctx.save_for_backward(output[1], args.t, args.alphas_cumprod)


def _loss_gradients(ctx: Any, wanted: Any, grad: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:
    """d loss/d pred times the row's upstream gradient [B]; the target's is its negative, chained to what formed it."""
    if grad is None:
        return {}
    saved, t, alphas_cumprod = ctx.saved_tensors
    saved = first_derivative("masked_diffusion_loss", saved)
    rows = grad.view(-1, *[1] * (saved.dim() - 1))  # [B, 1, ...]
    by_pred = saved * rows.to(saved.dtype)  # [B, C, ...]
    target, x0, noise = ctx.dtypes
    found: dict[str, Tensor | None] = {"pred": by_pred}
    if wanted.target:
        found["target"] = -by_pred.to(target)
    if wanted.x0 and ctx.prediction_type != "epsilon":
        sigma = 1.0
        if ctx.prediction_type == "v":
            sigma = -(1 - alphas_cumprod[t].to(grad.dtype).view_as(rows)).sqrt()
        found["x0"] = -(by_pred * sigma).to(x0)
    if wanted.noise and ctx.prediction_type != "sample":
        signal = alphas_cumprod[t].to(grad.dtype).view_as(rows).sqrt() if ctx.prediction_type == "v" else 1.0
        found["noise"] = -(by_pred * signal).to(noise)
    return found


_room = dispatch.Room("diffusion")
_q_sample_backward = Op(
    "q_sample_backward", _room, NoisingGradientArguments, returns="(Tensor, Tensor)", fake=_noising_gradient_fake
)
_q_sample = Op(
    "q_sample",
    _room,
    NoisingArguments,
    returns="(Tensor, Tensor)",
    fake=_noising_fake,
    save=_noising_save,
    gradients=_noising_gradients,
)
_diffusion_loss = Op(
    "diffusion_loss",
    _room,
    LossArguments,
    returns="(Tensor, Tensor)",
    fake=_loss_fake,
    save=_loss_save,
    gradients=_loss_gradients,
)

"""Projected gradient descent in place: `pgd_step_` and `pgd_random_start_`, radii in pixel units.

One call replaces the seven to thirteen elementwise kernels of a hand-written step, keeps x_adv at its address (for CUDA
graphs) and needs no autograd. Source: Madry et al. 2018.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import BudgetError, GradientError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.library import Op
from poisonshield.ops.pgd.reference import StartArguments, StepArguments

__all__ = ["pgd_random_start_", "pgd_step_"]

NORMS = ("linf", "l2", "sign_l2")
_STREAM = 0x70676473  # "pgds": where this op's random numbers lie unless the caller names another stream


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    targeted: bool | Tensor = False,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
    active: Tensor | None = None,
    levels: int = 0,
    backend: str = "auto",
) -> Tensor:
    """x_adv, moved in place: up the gradient by `step_size`, back into the eps-ball around `clean`, and into `clip`.

    x_adv, grad, clean [B, ...] of one shape, floats; clean may be uint8 pixels. step_size, eps: number or [B], in pixel
    units (4/255, not 4), also where x_adv is normalized by mean and std [C]. targeted (bool or [B]) moves down instead.
    norm: "linf" (sign step, box), "l2" (normalized step, Euclidean ball, in pixel space), "sign_l2" (sign step, ball).
    mask, broadcastable to x_adv: where 0, x_adv becomes clean. active [B] bool: other rows stay untouched.
    levels: 255 snaps to the lattice of 8-bit images, towards clean, so that eps survives saving. Half precision is
    rounded so that the ball still holds.

    A zero gradient, or an l2 gradient of non-finite length, gives no step; a NaN element none in linf. NaN in x_adv or
    clean stays NaN. Numbers on a CUDA device are not checked, since that would wait for it. Raises TypeError,
    ShapeError, BudgetError (radii), ValueError, GradientError (x_adv requires gradients: use torch.no_grad()).
    """
    _check(x_adv, clean, norm, mask, levels, clip)
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        raise TypeError(f"grad is {_kind(grad)}. Give a float tensor of the shape of x_adv.")
    _check_same(x_adv, grad, "grad")
    _check_separate(x_adv, grad, "grad")
    step_size = _per_sample(x_adv, step_size, "step_size")
    if isinstance(targeted, Tensor):
        if targeted.dtype != torch.bool or targeted.shape != (len(x_adv),):
            raise ShapeError(f"targeted is {_kind(targeted)}. Give a bool, or a bool tensor [{len(x_adv)}].")
        step_size = torch.where(targeted, -step_size, step_size)
    elif targeted:
        step_size = -step_size
    if active is not None and (active.dtype != torch.bool or active.shape != (len(x_adv),)):
        raise ShapeError(f"active is {_kind(active)}. Give a bool tensor [{len(x_adv)}].")
    _check_device(x_adv, active, "active")
    mean, std = _statistics(x_adv, mean, std)
    arguments = StepArguments(
        x_adv=x_adv,
        grad=grad,
        clean=clean,
        step_size=step_size,
        eps=_per_sample(x_adv, eps, "eps"),
        norm=norm,
        mean=mean,
        std=std,
        clip_low=float(clip[0]),
        clip_high=float(clip[1]),
        mask=mask,
        active=active,
        levels=levels,
    )
    _pgd_step(arguments, dispatch.requested(backend))
    return x_adv


def pgd_random_start_(
    x_adv: Tensor,
    clean: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    seed: int | Tensor,
    offset: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    stream: int = _STREAM,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
    levels: int = 0,
    backend: str = "auto",
) -> Tensor:
    """x_adv, overwritten by a uniform draw from the eps-ball around `clean`, clipped.

    linf: each element uniform in [-eps, eps); l2 and sign_l2: uniform in the Euclidean ball. A sample's draw depends on
    (seed, offset, stream, its id, the element's index in row-major order) alone, on every backend: linf to the bit, l2
    to rounding. sample_ids int64 [B], by default 0 .. B-1. seed, offset: integers, or int64 tensors of one element on
    the device, which a captured CUDA graph reads anew. Other arguments and errors as in `pgd_step_`.
    """
    _check(x_adv, clean, norm, mask, levels, clip)
    if sample_ids is None:
        sample_ids = torch.arange(len(x_adv), device=x_adv.device)
    elif sample_ids.dtype != torch.int64 or sample_ids.shape != (len(x_adv),):
        raise ShapeError(f"sample_ids is {_kind(sample_ids)}. Give int64 [{len(x_adv)}].")
    _check_device(x_adv, sample_ids, "sample_ids")
    mean, std = _statistics(x_adv, mean, std)
    arguments = StartArguments(
        x_adv=x_adv,
        clean=clean,
        eps=_per_sample(x_adv, eps, "eps"),
        norm=norm,
        seed=_whole(x_adv, seed, "seed"),
        offset=_whole(x_adv, offset, "offset"),
        sample_ids=sample_ids,
        stream=_whole(x_adv, stream, "stream"),
        mean=mean,
        std=std,
        clip_low=float(clip[0]),
        clip_high=float(clip[1]),
        mask=mask,
        levels=levels,
    )
    _pgd_random_start(arguments, dispatch.requested(backend))
    return x_adv


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check(
    x_adv: Tensor, clean: Tensor, norm: str, mask: Tensor | None, levels: int, clip: tuple[float, float]
) -> None:
    if not isinstance(x_adv, Tensor) or not x_adv.is_floating_point():
        raise TypeError(f"x_adv is {_kind(x_adv)}. Give a float tensor [B, ...].")
    if not isinstance(clean, Tensor) or not (clean.is_floating_point() or clean.dtype == torch.uint8):
        raise TypeError(f"clean is {_kind(clean)}. Give floats in the space of x_adv, or uint8 pixels.")
    if x_adv.dim() < 2:
        raise ShapeError(f"x_adv has shape {tuple(x_adv.shape)}. Give a batch [B, ...].")
    if any(s == 0 and n > 1 for s, n in zip(x_adv.stride(), x_adv.shape, strict=True)):
        raise ShapeError("x_adv is an expanded view: several elements share memory. Call .contiguous() first.")
    if x_adv.requires_grad and torch.is_grad_enabled():
        raise GradientError("x_adv requires gradients, and the step has none. Call it under torch.no_grad().")
    _check_same(x_adv, clean, "clean")
    _check_separate(x_adv, clean, "clean")
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown. Known: {', '.join(NORMS)}")
    if not clip[1] >= clip[0]:
        raise ValueError(f"clip {clip} is empty. Give (low, high).")
    if levels < 0:
        raise ValueError(f"levels {levels}: give 255 for 8-bit images, 0 for none.")
    if mask is not None:
        _check_device(x_adv, mask, "mask")
        fits = mask.dim() == x_adv.dim() and all(m in (1, n) for m, n in zip(mask.shape, x_adv.shape, strict=True))
        if not fits:
            raise ShapeError(f"mask {tuple(mask.shape)} does not broadcast to x_adv {tuple(x_adv.shape)}.")


def _check_same(x_adv: Tensor, other: Tensor, name: str) -> None:
    if other.shape != x_adv.shape:
        raise ShapeError(f"{name} has shape {tuple(other.shape)} and x_adv {tuple(x_adv.shape)}. They must be equal.")
    _check_device(x_adv, other, name)


def _check_device(x_adv: Tensor, other: Tensor | None, name: str) -> None:
    if other is not None and other.device != x_adv.device:
        raise ValueError(f"{name} is on {other.device} and x_adv on {x_adv.device}. Move one of them.")


def _check_separate(x_adv: Tensor, other: Tensor, name: str) -> None:
    if torch.compiler.is_compiling() or not x_adv.numel():
        return
    if x_adv.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        raise ValueError(f"{name} shares memory with x_adv, which changes in place. Give x_adv a .clone() of its own.")


def _per_sample(x_adv: Tensor, value: float | Tensor, name: str) -> Tensor:
    """float [B] on the device: float64 only where x_adv is."""
    dtype = torch.promote_types(x_adv.dtype, torch.float32)
    if isinstance(value, Real) and not isinstance(value, bool):
        if not value >= 0:
            raise BudgetError(f"{name} {value} is negative or NaN. Give pixel units, such as 4/255.")
        return torch.full((len(x_adv),), value, dtype=dtype, device=x_adv.device)
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} is {_kind(value)}. Give a number or a tensor [{len(x_adv)}].")
    if value.dim() > 1 or (value.dim() == 1 and len(value) not in (1, len(x_adv))):
        raise ShapeError(
            f"{name} has shape {tuple(value.shape)} for {len(x_adv)} samples. Give one number, or one each."
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((value >= 0).all()):
        raise BudgetError(f"{name} {value.tolist()} has a negative or NaN entry. Give pixel units, such as 4/255.")
    return value.detach().to(x_adv.device, dtype).expand(len(x_adv)).contiguous()


def _statistics(x_adv: Tensor, mean: Tensor | None, std: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: give both or neither.")
    if mean is None or std is None:
        return None, None
    channels = x_adv.shape[1]
    for name, value in (("mean", mean), ("std", std)):
        if not isinstance(value, Tensor) or value.numel() != channels:
            raise ShapeError(f"{name} is {_kind(value)}. Give a tensor [{channels}], one number per channel.")
    dtype = torch.promote_types(x_adv.dtype, torch.float32)
    mean, std = (v.detach().reshape(-1).to(x_adv.device, dtype) for v in (mean, std))
    if std.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((std > 0).all()):
        raise ValueError(f"std {std.tolist()} must be positive.")
    return mean, std


def _whole(x_adv: Tensor, value: int | Tensor, name: str) -> Tensor:
    """int64 of one element on the device; 64 bits count, whatever the sign."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != x_adv.device:
            raise ShapeError(f"{name} is {_kind(value)}. Give an integer, or one int64 on {x_adv.device}.")
        return value.reshape(())
    signed = ((value + 2**63) % 2**64) - 2**63
    return torch.full((), signed, dtype=torch.int64, device=x_adv.device)


def _no_output(arguments: StepArguments | StartArguments) -> None:
    return None


_room = dispatch.Room("pgd")
_pgd_step = Op("pgd_step_", _room, StepArguments, returns="()", fake=_no_output)
_pgd_random_start = Op("pgd_random_start_", _room, StartArguments, returns="()", fake=_no_output)

"""Projected gradient descent in place: `pgd_step_` and `pgd_random_start_`, radii in pixel units.

One call replaces the seven to thirteen elementwise kernels of a hand-written step, keeps x_adv at its address (for CUDA
graphs) and needs no autograd. Source: Madry et al. 2018.
"""

import math

import torch
from torch import Tensor

from poisonshield.errors import BudgetError, GradientError, ShapeError
from poisonshield.ops import dispatch
from poisonshield.ops.check import (
    bring,
    check_choice,
    check_device,
    check_floats,
    check_interval,
    check_number,
    check_reach,
    check_tensor,
    check_without_gradient,
    has_memory,
    is_number,
    kind,
    levels_hint,
    readable,
    statistics,
    word,
)
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

    Refused as no pixel units, 8 in place of 8/255: an eps larger than the clip is wide (for a Euclidean ball: than its
    diagonal), and a step_size larger than twice that. clip=(-inf, inf) has no such bound.

    A zero gradient, or an l2 gradient of non-finite length, gives no step; a NaN element none in linf. NaN in x_adv or
    clean stays NaN. Numbers on a CUDA device are not checked, since that would wait for it. Raises TypeError,
    ShapeError, BudgetError (radii), ConfigError, GradientError (x_adv, or a radius, requires gradients).
    """
    _check(x_adv, clean, norm, mask, levels, clip)
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        raise TypeError(f"grad is {kind(grad)}. Give a float tensor of the shape of x_adv.")
    _check_same(x_adv, grad, "grad")
    _check_separate(x_adv, grad, "grad")
    reach = _reach(x_adv, norm, clip)
    step_each, step_number = _per_sample(x_adv, step_size, "step_size", most=2 * reach)
    eps_each, eps_number = _per_sample(x_adv, eps, "eps", most=reach)
    if isinstance(targeted, Tensor):
        _check_flags(x_adv, targeted, "targeted")
        step_each = torch.where(targeted, -1.0, 1.0).to(_wide(x_adv)) * (
            step_number if step_each is None else step_each
        )
    elif targeted not in (True, False):
        raise TypeError(f"targeted is {targeted!r}. Give a bool, or a bool tensor [{x_adv.shape[0]}].")
    elif targeted:
        step_each, step_number = None if step_each is None else -step_each, -step_number
    if active is not None:
        _check_flags(x_adv, active, "active")
    normalized = statistics(x_adv, mean, std, channels=x_adv.shape[1], owner="x_adv")
    mean, std = normalized or (None, None)
    arguments = StepArguments(
        x_adv=x_adv,
        grad=grad,
        clean=clean,
        step_size=step_each,
        step_number=step_number,
        eps=eps_each,
        eps_number=eps_number,
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
        sample_ids = torch.arange(x_adv.shape[0], device=x_adv.device)
    elif not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64 or sample_ids.shape != x_adv.shape[:1]:
        raise ShapeError(f"sample_ids is {kind(sample_ids)}. Give int64 [{x_adv.shape[0]}].")
    check_device(x_adv, sample_ids, "sample_ids", owner="x_adv")
    if mean is None and clip[1] - clip[0] < math.inf:
        check_reach(clean, clip, "clean")  # once an attack; a step is not worth the time
    normalized = statistics(x_adv, mean, std, channels=x_adv.shape[1], owner="x_adv")
    mean, std = normalized or (None, None)
    eps_each, eps_number = _per_sample(x_adv, eps, "eps", most=_reach(x_adv, norm, clip))
    seed_word, seed_number = _word(x_adv, seed, "seed")
    offset_word, offset_number = _word(x_adv, offset, "offset")
    stream_word, stream_number = _word(x_adv, stream, "stream")
    arguments = StartArguments(
        x_adv=x_adv,
        clean=clean,
        eps=eps_each,
        eps_number=eps_number,
        norm=norm,
        seed=seed_word,
        seed_number=seed_number,
        offset=offset_word,
        offset_number=offset_number,
        stream=stream_word,
        stream_number=stream_number,
        sample_ids=sample_ids,
        mean=mean,
        std=std,
        clip_low=float(clip[0]),
        clip_high=float(clip[1]),
        mask=mask,
        levels=levels,
    )
    _pgd_random_start(arguments, dispatch.requested(backend))
    return x_adv


def _check(
    x_adv: Tensor, clean: Tensor, norm: str, mask: Tensor | None, levels: int, clip: tuple[float, float]
) -> None:
    check_floats("x_adv", x_adv, "a float tensor [B, ...]")
    check_tensor("clean", clean, "floats in the space of x_adv, or uint8 pixels")
    if not (clean.is_floating_point() or clean.dtype == torch.uint8):
        raise TypeError(f"clean is {kind(clean)}. Give floats in the space of x_adv, or uint8 pixels.")
    if x_adv.dim() < 2:
        raise ShapeError(f"x_adv has shape {tuple(x_adv.shape)}. Give a batch [B, ...].")
    if any(s == 0 and n > 1 for s, n in zip(x_adv.stride(), x_adv.shape, strict=True)):
        raise ShapeError("x_adv is an expanded view: several elements share memory. Call .contiguous() first.")
    if x_adv.requires_grad and torch.is_grad_enabled():
        raise GradientError("x_adv requires gradients, and the step has none. Call it under torch.no_grad().")
    _check_same(x_adv, clean, "clean")
    _check_separate(x_adv, clean, "clean")
    check_choice("norm", norm, NORMS)
    check_interval("clip", clip)
    check_number("levels", levels, least=0, whole=True)
    if mask is not None:
        check_tensor("mask", mask, "bools or numbers that broadcast to x_adv")
        check_device(x_adv, mask, "mask", owner="x_adv")
        fits = mask.dim() == x_adv.dim() and all(m in (1, n) for m, n in zip(mask.shape, x_adv.shape, strict=True))
        if not fits:
            raise ShapeError(f"mask {tuple(mask.shape)} does not broadcast to x_adv {tuple(x_adv.shape)}.")


def _check_same(x_adv: Tensor, other: Tensor, name: str) -> None:
    if other.shape != x_adv.shape:
        raise ShapeError(f"{name} has shape {tuple(other.shape)} and x_adv {tuple(x_adv.shape)}. They must be equal.")
    check_device(x_adv, other, name, owner="x_adv")


def _check_separate(x_adv: Tensor, other: Tensor, name: str) -> None:
    if not has_memory(x_adv) or not x_adv.numel():
        return
    if x_adv.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        raise ValueError(f"{name} shares memory with x_adv, which changes in place. Give x_adv a .clone() of its own.")


def _check_flags(x_adv: Tensor, value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != x_adv.shape[:1]:
        raise ShapeError(f"{name} is {kind(value)}. Give a bool tensor [{x_adv.shape[0]}].")
    check_device(x_adv, value, name, owner="x_adv")


def _reach(x_adv: Tensor, norm: str, clip: tuple[float, float]) -> float:
    """The longest distance between two samples inside the clip, in the norm; inf where it has no end."""
    if torch.compiler.is_compiling():  # a number of a traced size would tie the program to it
        return math.inf
    return (clip[1] - clip[0]) * (1 if norm == "linf" else math.sqrt(max(1, math.prod(x_adv.shape[1:]))))


def _check_radius(value: float, name: str, most: float) -> None:
    if not value >= 0:
        raise BudgetError(f"{name} {value} is negative or NaN. Give pixel units, such as 4/255.")
    if value > most * (1 + 1e-6):
        raise BudgetError(
            f"{name} {value:g} reaches beyond the clip: radii are in pixel units, here {most:g} at most."
            + levels_hint(value)
        )


def _wide(x_adv: Tensor) -> torch.dtype:
    """The dtype of radii: float64 only where x_adv is."""
    return torch.promote_types(x_adv.dtype, torch.float32)


def _per_sample(x_adv: Tensor, value: float | Tensor, name: str, *, most: float) -> tuple[Tensor | None, float]:
    """(float [B] on the device, unused), or (None, the number of all). Raises BudgetError outside 0..most."""
    if not isinstance(value, Tensor) and is_number(value):
        _check_radius(value, name, most)
        if torch.compiler.is_compiling():  # a number of the program would compile it anew for each other one
            return torch.full((x_adv.shape[0],), value, dtype=_wide(x_adv), device=x_adv.device), 0.0
        return None, float(value)
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} is {kind(value)}. Give a number or a tensor [{x_adv.shape[0]}].")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, x_adv.shape[0])):
        raise ShapeError(
            f"{name} has shape {tuple(value.shape)} for {x_adv.shape[0]} samples. Give one number, or one each."
        )
    check_without_gradient(**{name: value})
    if readable(value):
        if not bool((value >= 0).all()):
            raise BudgetError(f"{name} {value.tolist()} has a negative or NaN entry. Give pixel units, such as 4/255.")
        if value.numel():
            _check_radius(float(value.max()), name, most)
    return bring(x_adv, value, name, owner="x_adv").to(_wide(x_adv)).expand(x_adv.shape[0]).contiguous(), 0.0


def _word(x_adv: Tensor, value: int | Tensor, name: str) -> tuple[Tensor | None, int]:
    """(int64 [], unused), or (None, the number's lowest 64 bits as a signed number)."""
    if isinstance(value, Tensor) or torch.compiler.is_compiling() or not is_number(value, whole=True):
        return word(x_adv, value, name), 0
    return None, (int(value) + 2**63) % 2**64 - 2**63


def _no_output(arguments: StepArguments | StartArguments) -> None:
    return None


_room = dispatch.Room("pgd")
_pgd_step = Op("pgd_step_", _room, StepArguments, returns="()", fake=_no_output)
_pgd_random_start = Op("pgd_random_start_", _room, StartArguments, returns="()", fake=_no_output)

"""What ops and losses ask of their arguments, in one place and in the same words.

Nothing here waits for a device: numbers in tensors are looked at on the CPU alone, and never in a call that is traced.
A number of Python always is.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from poisonshield.errors import ConfigError, GradientError, ShapeError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kind(value: Any) -> str:
    """What a value is, for a message: dtype and shape of a tensor, else its class."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def levels_hint(value: float) -> str:
    """The end of a message about a radius that is too large: what was meant, if 8-bit levels may have been."""
    return f" Did you mean {value:g}/255?" if 1 < value <= 255 else ""


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether it is a number of Python, or of numpy, and no bool; whole: an integer."""
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def readable(x: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting: on the CPU, neither traced nor fake."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def has_memory(x: Tensor) -> bool:
    """Whether it lies somewhere, so that it can share memory with another one: neither traced, fake nor meta."""
    return not (torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.device.type == "meta")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ConfigError with the known names for an unknown one."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} {value!r} is unknown. Known: {', '.join(known)}")


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    whole: bool = False,
    infinite: bool = False,
) -> None:
    """Raises TypeError for what is no number, ConfigError for one that is not finite, outside the bounds or not whole.

    A tensor of one number is taken too; it is looked at where `readable`. infinite: whether inf is allowed.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not whole:
        if not readable(value):
            return
        value = value.detach().item()
    if not is_number(value, whole=whole):
        raise TypeError(f"{name} is {kind(value)}. Give {_wanted(least, above, most, below, whole, infinite)}.")
    inside = least <= value <= most and (above == -math.inf or value > above) and (below == math.inf or value < below)
    if not inside or not (infinite or -math.inf < value < math.inf):
        raise ConfigError(f"{name} {value} is refused. Give {_wanted(least, above, most, below, whole, infinite)}.")


def _wanted(least: float, above: float, most: float, below: float, whole: bool, infinite: bool) -> str:
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("of at least", least), ("above", above), ("of at most", most), ("below", below))
        if not math.isinf(bound)
    ]
    what = "a whole number" if whole else "a number" if infinite else "a finite number"
    return f"{what} {' and '.join(bounds)}" if bounds else what


def check_interval(name: str, value: Any) -> None:
    """Raises TypeError for anything but two numbers, ConfigError where they are not in order."""
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(v, Real) for v in value):
        raise TypeError(f"{name} is {value!r}. Give two numbers, (low, high).")
    if not value[1] >= value[0]:
        raise ConfigError(f"{name} {value} is empty. Give (low, high).")


def check_reach(x: Tensor, interval: tuple[float, float], name: str = "x", *, way_out: str = "") -> None:
    """Raises ShapeError for pixels on the CPU that lie in another space than interval (low, high).

    A value a little outside is none of its affair; one that is further below than the interval is wide, or twice as far
    above, comes from 8-bit levels or from normalization. An infinite one is no sign of either.
    """
    if not readable(x) or not x.is_floating_point() or not x.numel():
        return
    # In the order of memory: reading across it takes four times as long.
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    least, most = (float(v) for v in (x.detach().permute(0, 2, 3, 1) if last else x.detach()).aminmax())
    low, high = interval
    if not (-math.inf < least < 2 * low - high or math.inf > most > 3 * high - 2 * low):
        return
    levels = least >= 0 and most <= 255
    advice = "Divide 8-bit levels by 255" if levels else "Normalize inside the model, or say how x is normalized"
    raise ShapeError(
        f"{name} reaches from {least:.4g} to {most:.4g}, and pixels here are in ({low:g}, {high:g}): another space.\n"
        f"  {advice}{way_out}."
    )


def check_tensor(name: str, value: Any, wanted: str) -> None:
    """Raises TypeError for anything but an ordinary tensor of numbers; wanted: what to give, for the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {kind(value)}. Give {wanted}.")
    if value.layout != torch.strided:
        raise TypeError(f"{name} is a {value.layout} tensor. Give {wanted}, such as {name}.to_dense().")
    if value.is_complex():
        raise TypeError(f"{name} is {kind(value)}. Give {wanted}.")


def check_floats(name: str, value: Any, wanted: str) -> None:
    """Raises TypeError for anything but an ordinary tensor of 16, 32 or 64 bit floats."""
    check_tensor(name, value, wanted)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} is {kind(value)}. Give {wanted}.")


def check_out_dtype(dtype: Any) -> None:
    """Raises TypeError for anything but None or a float dtype."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"out_dtype {dtype!r} is refused. Give one of {', '.join(map(str, FLOATS))}.")


def check_device(x: Tensor, other: Tensor | None, name: str, *, owner: str) -> None:
    """Raises ConfigError for a tensor on another device than x, which messages call `owner`."""
    if other is not None and other.device != x.device:
        raise ConfigError(f"{name} is on {other.device} and {owner} on {x.device}. Move one of them.")


def check_without_gradient(**tensors: Tensor | None) -> None:
    """Raises GradientError for a tensor that requires gradients, since none would reach it."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise GradientError(
                f"{name} requires gradients, and none would reach it. "
                f"Give {name}.detach(), or call under torch.no_grad()."
            )


def bring(x: Tensor, value: Tensor, name: str, *, owner: str) -> Tensor:
    """A small tensor on the device of x: one on the CPU is moved. Raises ConfigError for one on a third device."""
    if value.device.type != "cpu":
        check_device(x, value, name, owner=owner)
    return value.to(x.device)


def statistics(
    x: Tensor, mean: Tensor | None, std: Tensor | None, *, channels: int, owner: str
) -> tuple[Tensor, Tensor] | None:
    """mean and std [channels] on the device of x, in at least float32; None where neither is given."""
    if (mean is None) != (std is None):
        raise ConfigError("mean and std go together: give both or neither.")
    if mean is None or std is None:
        return None
    for name, value in (("mean", mean), ("std", std)):
        if not isinstance(value, Tensor) or value.is_complex() or value.numel() != channels:
            raise ShapeError(f"{name} is {kind(value)}. Give a tensor [{channels}]: {channels} numbers, one a channel.")
        check_without_gradient(**{name: value})
        if readable(value) and not bool(value.isfinite().all()):
            raise ConfigError(f"{name} {value.tolist()} is not finite.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, std = (bring(x, v.detach(), n, owner=owner).reshape(-1).to(dtype) for v, n in ((mean, "mean"), (std, "std")))
    if readable(std) and not bool((std > 0).all()):
        raise ConfigError(f"std {std.tolist()} must be positive.")
    return mean, std


def word(x: Tensor, value: Any, name: str) -> Tensor:
    """A whole number, or a tensor of one, as int64 [] on the device of x; 64 bits count, whatever the sign."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != x.device:
            raise ShapeError(f"{name} is {kind(value)}. Give an integer, or one int64 on {x.device}.")
        return value.reshape(())
    if not is_number(value, whole=True) and not isinstance(value, torch.SymInt):
        raise TypeError(f"{name} is {kind(value)}. Give an integer, or one int64 on {x.device}.")
    return torch.full((), ((value + 2**63) % 2**64) - 2**63, dtype=torch.int64, device=x.device)

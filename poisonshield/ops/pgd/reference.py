"""Projected gradient descent in plain PyTorch: step, project, clip, in place. Source: Madry et al. 2018.

Radii are in pixel units; x_adv may live in a normalized space, x = (pixel - mean) / std. Sums of squares run in
float64, so that a sample's result does not depend on its batch. The linf step has no product whose rounding a fused
multiply-add would skip; the random start has one, (2u - 1) * eps, which kernels must round to be equal to the bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poisonshield.random import philox_normal, philox_uniform


class StepArguments(NamedTuple):
    """What `pgd_step_` takes. x_adv, grad and clean have one shape [B, ...]; with mean and std it is [B, C, ...]."""

    x_adv: Tensor  # [B, ...], moved in place
    grad: Tensor  # [B, ...], d loss/d x_adv
    clean: Tensor  # [B, ...], the original: in the space of x_adv, or uint8 pixels
    step_size: Tensor | None  # [B], how far to go, in pixel units; negative goes down
    step_number: float  # the same for all samples, where step_size is None: needs no memory on a device
    eps: Tensor | None  # [B], radius of the ball around clean, in pixel units
    eps_number: float  # the same for all samples, where eps is None
    norm: str  # "linf" (sign step, box), "l2" (step of that length, ball), "sign_l2" (sign step, ball)
    mean: Tensor | None  # [C], of the normalized space; None where x_adv holds pixels
    std: Tensor | None  # [C], given if mean is
    clip_low: float  # least pixel
    clip_high: float  # greatest pixel
    mask: Tensor | None  # broadcastable to x_adv; where 0, x_adv becomes clean
    active: Tensor | None  # bool [B]; other rows stay untouched
    levels: int  # 255 snaps to the lattice of 8-bit images, 0 snaps to none


class StartArguments(NamedTuple):
    """What `pgd_random_start_` takes; fields that are not explained here are those of `StepArguments`."""

    x_adv: Tensor  # [B, ...], overwritten
    clean: Tensor  # [B, ...]
    eps: Tensor | None  # [B]
    eps_number: float
    norm: str  # "linf": uniform in a box; else uniform in a Euclidean ball
    seed: Tensor | None  # int64 [], and the next six: where in Philox's numbers the draw lies
    seed_number: int  # where seed is None: needs no memory on a device
    offset: Tensor | None  # int64 []
    offset_number: int
    stream: Tensor | None  # int64 []
    stream_number: int
    sample_ids: Tensor  # int64 [B]
    mean: Tensor | None  # [C]
    std: Tensor | None  # [C]
    clip_low: float
    clip_high: float
    mask: Tensor | None
    levels: int


def pgd_step_(args: StepArguments) -> None:
    """x_adv moves by step_size along grad, then into the ball of radius eps around clean, then into the clip."""
    space = Space(args)
    if args.norm == "linf":
        low, high = space.box(space.each(args.eps, args.eps_number))
        new, bounds = _along_signs(args, space), (low, high)
    else:
        low, high = space.low, space.high
        new, bounds = _within_ball(args, space), None
    space.store(torch.minimum(torch.maximum(new, low), high), bounds, args.active)


def pgd_random_start_(args: StartArguments) -> None:
    """x_adv becomes a uniform draw from the ball around clean, clipped."""
    space = Space(args)
    if args.norm == "linf":
        low, high = space.box(space.each(args.eps, args.eps_number))
        new, bounds = _drawn_from_box(args, space), (low, high)
    else:
        low, high = space.low, space.high
        new, bounds = _drawn_from_ball(args, space), None
    space.store(torch.minimum(torch.maximum(new, low), high), bounds, None)


def _along_signs(args: StepArguments, space: "Space") -> Tensor:
    """x_adv + step_size * sign(grad), a NaN giving no step: [B, ...], not projected."""
    signs = args.grad.to(space.dtype).nan_to_num(nan=0.0).sign()
    return args.x_adv.to(space.dtype) + signs * (space.each(args.step_size, args.step_number) / space.std)


def _within_ball(args: StepArguments, space: "Space") -> Tensor:
    """x_adv after a step of Euclidean length (l2) or of signs (sign_l2), drawn back into the ball: [B, ...]."""
    grad = args.grad.to(space.dtype)
    direction = grad / space.std if args.norm == "l2" else grad.nan_to_num(nan=0.0).sign()  # d loss/d pixel, or signs
    if args.mask is not None:
        direction = direction.where(args.mask != 0, 0.0)
    if args.norm == "l2":
        direction = _unit(direction)
    delta = (args.x_adv.to(space.dtype) - space.clean) * space.std  # in pixel units
    step = space.each(args.step_size, args.step_number)
    return space.into_ball(delta + step * direction, space.each(args.eps, args.eps_number))


def _drawn_from_box(args: StartArguments, space: "Space") -> Tensor:
    """clean + (2u - 1) * eps with u uniform in [0, 1): [B, ...]."""
    seed, offset, stream = place_of(args)
    u = philox_uniform(args.x_adv.shape, seed, offset, sample_ids=args.sample_ids, stream=stream).to(space.dtype)
    return space.clean + (u * 2 - 1) * (space.each(args.eps, args.eps_number) / space.std)


def _drawn_from_ball(args: StartArguments, space: "Space") -> Tensor:
    """clean plus a Gaussian direction at the radius eps * u^(1/n), n the number of free elements: [B, ...]."""
    x_adv, eps = args.x_adv, space.each(args.eps, args.eps_number)
    count, (seed, offset, stream) = x_adv[:1].numel(), place_of(args)
    noise = philox_normal(count, seed=seed, ids=args.sample_ids, offset=offset, stream=stream)
    noise = noise.view(x_adv.shape).to(space.dtype)  # [B, ...]
    free = torch.full_like(eps, count)
    if args.mask is not None:
        noise = noise.where(args.mask != 0, 0.0)
        free = space.per_sample((args.mask != 0).expand(x_adv.shape).flatten(1).sum(1).clamp(min=1))
    u = philox_uniform((len(x_adv), 1), seed, offset, sample_ids=args.sample_ids, stream=stream + 1)
    radius = eps * space.per_sample(u[:, 0]) ** (1 / free)  # [B, 1, ...]
    length = space.per_sample(_length(noise).clamp_min(1e-12))
    return space.clean + noise * (radius / length) / space.std


def place_of(args: StartArguments) -> tuple[int | Tensor, int | Tensor, int | Tensor]:
    """seed, offset and stream, as tensors where they are."""
    return (
        args.seed_number if args.seed is None else args.seed,
        args.offset_number if args.offset is None else args.offset,
        args.stream_number if args.stream is None else args.stream,
    )


class Space:
    """The original pixels and the limits, in the space and precision of the computation."""

    def __init__(self, args: StepArguments | StartArguments) -> None:
        self.x_adv, self.mask, self.levels = args.x_adv, args.mask, args.levels
        self.dtype = torch.promote_types(args.x_adv.dtype, torch.float32)
        self.mean = self._per_channel(args.mean, 0.0)
        self.std = self._per_channel(args.std, 1.0)
        self.low, self.high = (args.clip_low - self.mean) / self.std, (args.clip_high - self.mean) / self.std
        self.clean = args.clean.to(self.dtype)
        if args.clean.dtype == torch.uint8:
            self.clean = (self.clean / 255 - self.mean) / self.std

    def per_sample(self, values: Tensor) -> Tensor:
        """[B] -> [B, 1, ...]."""
        return values.to(self.dtype).view(-1, *[1] * (self.x_adv.dim() - 1))

    def each(self, values: Tensor | None, number: float) -> Tensor:
        """[B, 1, ...] of a number for each sample, or [] of one for all."""
        return self.x_adv.new_full((), number, dtype=self.dtype) if values is None else self.per_sample(values)

    def _per_channel(self, values: Tensor | None, default: float) -> Tensor:
        """[C] -> [C, 1, ...], or the default as a scalar."""
        if values is None:
            return self.x_adv.new_full((), default, dtype=self.dtype)
        return values.to(self.dtype).view(-1, *[1] * (self.x_adv.dim() - 2))

    def box(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The box around clean, clipped, as limits of each element; where clean is out of range, the nearest pixel."""
        reach = eps / self.std
        low, high = (
            torch.minimum(torch.maximum(v, self.low), self.high) for v in (self.clean - reach, self.clean + reach)
        )
        return low, high

    def into_ball(self, delta: Tensor, eps: Tensor) -> Tensor:
        """clean plus delta (pixel units), shortened to length eps where it is longer."""
        if self.mask is not None:
            delta = delta.where(self.mask != 0, 0.0)
        length = self.per_sample(_length(delta))
        return self.clean + delta * torch.where(length > eps, eps / length, 1.0) / self.std

    def store(self, new: Tensor, bounds: tuple[Tensor, Tensor] | None, active: Tensor | None) -> None:
        """Write new to x_adv: snapped to the lattice, never rounded out of bounds; masked pixels and idle rows kept."""
        x_adv = self.x_adv
        if self.levels:
            new = self._snap(new, self.levels)
        if self.mask is not None:
            new = new.where(self.mask != 0, self.clean)
        stored = new.to(x_adv.dtype)
        if x_adv.dtype != self.dtype:
            low, high = bounds if bounds else (torch.minimum(new, self.clean), torch.maximum(new, self.clean))
            stored = _neighbour(stored, stored.to(self.dtype) > high, up=False)
            stored = _neighbour(stored, stored.to(self.dtype) < low, up=True)
        if active is not None:
            stored = stored.where(active.view(-1, *[1] * (x_adv.dim() - 1)), x_adv)
        x_adv.copy_(stored)

    def _snap(self, new: Tensor, levels: int) -> Tensor:
        """The nearest k / levels (pixels), or the next one towards clean where that one is further away than `new`."""
        pixel, origin = new * self.std + self.mean, self.clean * self.std + self.mean
        k = (pixel * levels).round()
        beyond = (k / levels - origin).abs() > (pixel - origin).abs() + 2.0**-23  # one rounding of a pixel is no step
        return ((k - (pixel - origin).sign() * beyond) / levels - self.mean) / self.std


def _unit(x: Tensor) -> Tensor:
    """Each sample at length 1; 0 where its length is 0 or not finite."""
    wide = x.double()  # squares of small or large gradients leave the range of float32
    length = _length(wide)
    usable = length.isfinite() & (length > 0)
    shape = (-1, *[1] * (x.dim() - 1))
    unit = wide / length.where(usable, 1.0).view(shape)
    return unit.where(usable.view(shape), 0.0).to(x.dtype)


def _length(x: Tensor) -> Tensor:
    """Euclidean length of each sample, float64 [B]."""
    return x.flatten(1).square().sum(1, dtype=torch.float64).sqrt()


def _neighbour(x: Tensor, where: Tensor, *, up: bool) -> Tensor:
    """The next representable half precision number up or down, where asked."""
    bits = x.view(torch.int16)
    away = bits + 1  # the bit pattern of a float's magnitude counts upwards
    toward = bits - 1
    smallest = torch.full_like(bits, 1 if up else -32767)
    moved = torch.where(x == 0, smallest, torch.where((x > 0) == up, away, toward))
    return torch.where(where, moved, bits).view(x.dtype)


def examples() -> dict[str, list[Any]]:
    """Calls that the contract tests make of each op on every backend."""
    shape = (2, 3, 17, 9)
    x_adv, grad, clean = (philox_uniform(shape, seed) * 0.8 + 0.1 for seed in range(3))
    radius = torch.tensor([0.1, 0.2])
    step = StepArguments(
        x_adv=x_adv, grad=grad - 0.5, clean=clean, step_size=radius, step_number=0.0, eps=radius, eps_number=0.0,
        norm="linf", mean=None, std=None, clip_low=0.0, clip_high=1.0, mask=None, active=None, levels=0,
    )  # fmt: skip
    start = StartArguments(
        x_adv=x_adv, clean=clean, eps=radius, eps_number=0.0, norm="linf", seed=torch.tensor(5), seed_number=0,
        offset=torch.tensor(0), offset_number=0, stream=None, stream_number=1, sample_ids=torch.arange(2),
        mean=None, std=None, clip_low=0.0, clip_high=1.0, mask=None, levels=0,
    )  # fmt: skip
    return {
        "pgd_step_": [
            *(step._replace(norm=norm) for norm in ("linf", "l2", "sign_l2")),
            step._replace(norm="l2", step_size=None, step_number=0.1, eps=None, eps_number=0.2),
        ],
        "pgd_random_start_": [start._replace(norm=norm) for norm in ("linf", "l2")],
    }

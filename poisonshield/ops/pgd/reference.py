"""Projected gradient descent in plain PyTorch: step, project, clip, in place. Source: Madry et al. 2018.

Radii are in pixel units; x_adv may live in a normalised space, x = (pixel - mean) / std. Sums of squares run in
float64, so that a sample's result does not depend on its batch. The linf step has no product whose rounding a fused
multiply-add would skip; the random start has one, (2u - 1) * eps, which kernels must round to be equal to the bit.
"""

import torch
from torch import Tensor

from poisonshield.random import philox_normal, philox_uniform


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step: Tensor,
    eps: Tensor,
    norm: str,
    mean: Tensor | None,
    std: Tensor | None,
    clip_low: float,
    clip_high: float,
    mask: Tensor | None,
    active: Tensor | None,
    levels: int,
) -> None:
    """x_adv [B, ...] moves by step [B] (negative: down) along grad, then into the ball of radius eps [B] around x0."""
    space = Space(x_adv, x0, mean, std, clip_low, clip_high, mask)
    step, eps = space.per_sample(step), space.per_sample(eps)
    grad = grad.to(space.dtype)
    x = x_adv.to(space.dtype)
    if norm == "linf":
        new = x + grad.nan_to_num(nan=0.0).sign() * (step / space.std)
        low, high = space.box(eps)
        bounds = low, high
    else:
        pixel_grad = grad / space.std if norm == "l2" else grad.nan_to_num(nan=0.0).sign()
        if mask is not None:
            pixel_grad = pixel_grad.where(mask != 0, 0.0)
        if norm == "l2":
            pixel_grad = _unit(pixel_grad)
        new = space.into_ball((x - space.x0) * space.std + step * pixel_grad, eps)
        low, high = space.low, space.high
        bounds = None
    new = torch.minimum(torch.maximum(new, low), high)
    space.store(x_adv, new, bounds, active, levels)


def pgd_random_start_(
    x_adv: Tensor,
    x0: Tensor,
    eps: Tensor,
    norm: str,
    seed: Tensor,
    offset: Tensor,
    sample_ids: Tensor,
    stream: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    clip_low: float,
    clip_high: float,
    mask: Tensor | None,
    levels: int,
) -> None:
    """x_adv [B, ...] becomes a uniform draw from the ball around x0, clipped: linf a box, l2 a Euclidean ball."""
    space = Space(x_adv, x0, mean, std, clip_low, clip_high, mask)
    eps = space.per_sample(eps)
    count = x_adv[:1].numel()
    random: dict[str, Tensor] = {"seed": seed, "offset": offset}
    if norm == "linf":
        u = philox_uniform(x_adv.shape, **random, sample_ids=sample_ids, stream=stream).to(space.dtype)
        low, high = space.box(eps)
        new, bounds = space.x0 + (u * 2 - 1) * (eps / space.std), (low, high)
    else:
        noise = philox_normal(count, **random, ids=sample_ids, stream=stream).view(x_adv.shape).to(space.dtype)
        free = torch.full_like(eps, count)
        if mask is not None:
            noise = noise.where(mask != 0, 0.0)
            free = space.per_sample((mask != 0).expand(x_adv.shape).flatten(1).sum(1).clamp(min=1))
        radius = philox_uniform((len(x_adv), 1), **random, sample_ids=sample_ids, stream=stream + 1)
        radius = eps * space.per_sample(radius[:, 0]) ** (1 / free)
        length = space.per_sample(_length(noise).clamp_min(1e-12))
        new, bounds = space.x0 + noise * (radius / length) / space.std, None
        low, high = space.low, space.high
    space.store(x_adv, torch.minimum(torch.maximum(new, low), high), bounds, None, levels)


class Space:
    """The original pixels and the limits, in the space and precision of the computation."""

    def __init__(
        self,
        x_adv: Tensor,
        x0: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        clip_low: float,
        clip_high: float,
        mask: Tensor | None,
    ) -> None:
        self.dtype = torch.promote_types(x_adv.dtype, torch.float32)
        self.dim, self.mask = x_adv.dim(), mask
        self.mean, self.std = (
            x_adv.new_full((), default, dtype=self.dtype) if v is None else self._per_channel(v)
            for v, default in ((mean, 0.0), (std, 1.0))
        )
        self.low, self.high = (clip_low - self.mean) / self.std, (clip_high - self.mean) / self.std
        self.x0 = x0.to(self.dtype)
        if x0.dtype == torch.uint8:
            self.x0 = (self.x0 / 255 - self.mean) / self.std

    def per_sample(self, values: Tensor) -> Tensor:
        """[B] -> [B, 1, ...]."""
        return values.to(self.dtype).view(-1, *[1] * (self.dim - 1))

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).view(-1, *[1] * (self.dim - 2))

    def box(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Limits of each element: the box around x0, clipped. If x0 is out of range, its nearest valid pixel stays."""
        reach = eps / self.std
        low, high = (torch.minimum(torch.maximum(v, self.low), self.high) for v in (self.x0 - reach, self.x0 + reach))
        return low, high

    def into_ball(self, delta: Tensor, eps: Tensor) -> Tensor:
        """x0 plus delta (pixel units), shortened to length eps where it is longer."""
        if self.mask is not None:
            delta = delta.where(self.mask != 0, 0.0)
        length = self.per_sample(_length(delta))
        return self.x0 + delta * torch.where(length > eps, eps / length, 1.0) / self.std

    def store(
        self,
        x_adv: Tensor,
        new: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        active: Tensor | None,
        levels: int,
    ) -> None:
        """Write new to x_adv: snapped to the lattice, never rounded out of bounds; masked pixels and idle rows kept."""
        if levels:
            new = self._snapped(new, levels)
        if self.mask is not None:
            new = new.where(self.mask != 0, self.x0)
        stored = new.to(x_adv.dtype)
        if x_adv.dtype != self.dtype:
            low, high = bounds if bounds else (torch.minimum(new, self.x0), torch.maximum(new, self.x0))
            stored = _neighbour(stored, stored.to(self.dtype) > high, up=False)
            stored = _neighbour(stored, stored.to(self.dtype) < low, up=True)
        if active is not None:
            stored = stored.where(active.view(-1, *[1] * (self.dim - 1)), x_adv)
        x_adv.copy_(stored)

    def _snapped(self, new: Tensor, levels: int) -> Tensor:
        """The nearest k / levels (pixels), or the next one towards x0 where that one is further away than `new`."""
        pixel, origin = new * self.std + self.mean, self.x0 * self.std + self.mean
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

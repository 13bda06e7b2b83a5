"""What the kernel backends of the PGD ops need: which calls they take, and tensors laid out as they read them.

Kernels walk through a sample in the order of memory, whatever the order of dimensions, so that channels-last costs no
copy. All tensors of x_adv's shape must then lie as x_adv does; one that does not is copied, x_adv itself only where its
samples are not dense.
"""

import math

import torch
from torch import Tensor

from poisonshield.ops.pgd.reference import StartArguments, StepArguments
from poisonshield.ops.record import tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 2**31 - 4096  # elements of a sample: places within one are 32 bits wide, samples start at 64


def refused(args: StepArguments | StartArguments) -> str | None:
    """Why kernels on dense samples cannot take a call, or None."""
    x_adv = args.x_adv
    if x_adv.dtype not in DTYPES:
        return f"x_adv is {x_adv.dtype}, and these kernels store float32 and half precision"
    if args.levels:
        return "levels is done by the reference alone"
    if x_adv[:1].numel() > _LARGEST:
        return "a sample has 2^31 elements or more"
    away = next((v for v in tensors(args) if v.device != x_adv.device), None)
    return None if away is None else f"a tensor is on {away.device} and x_adv on {x_adv.device}"


class Layout:
    """How x_adv lies in memory. row_major: random numbers follow the order of elements, so that it must be known.

    x: x_adv, or a dense copy that `finish` brings back. count: elements of a sample. channels, channel_step: place i of
    a sample is of channel i // channel_step % channels. columns: place i is element (i % columns) * (count // columns)
    + i // columns in row-major order: the channels of channels-last, else 1.
    """

    def __init__(self, x_adv: Tensor, *, row_major: bool = False) -> None:
        last = not x_adv.is_contiguous() and x_adv.dim() > 2 and x_adv.movedim(1, -1).is_contiguous()
        fits = x_adv.is_contiguous() or last or (not row_major and _has_dense_samples(x_adv))
        self.x_adv, self.x = x_adv, x_adv if fits else x_adv.contiguous()
        self.count = x_adv[0].numel()
        self.channels, self.channel_step = x_adv.shape[1], max(1, self.x.stride(1))
        self.columns = self.channels if last else 1

    def finish(self) -> None:
        """What kernels wrote to x is in x_adv."""
        if self.x is not self.x_adv:
            self.x_adv.copy_(self.x)

    def alike(self, value: Tensor) -> Tensor:
        """value as x lies: itself, or a copy."""
        pairs = zip(value.shape, value.stride(), self.x.stride(), strict=True)
        if all(own == other or n == 1 for n, own, other in pairs):
            return value
        return torch.empty_strided(self.x.shape, self.x.stride(), dtype=value.dtype, device=value.device).copy_(value)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """uint8 of the shape of x and as it lies, 0 or 1."""
        if mask is None:
            return None
        flags = (mask if mask.dtype == torch.bool else mask != 0).expand(self.x.shape)
        return self.alike(flags).view(torch.uint8)


def _has_dense_samples(x: Tensor) -> bool:
    """Whether the samples lie one after the other, each without gaps, in some order of its dimensions."""
    below = 1
    for step, size in sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n > 1):
        if step != below:
            return False
        below *= size
    return len(x) == 1 or x.stride(0) == math.prod(x.shape[1:])

"""What both kernel backends of the diffusion ops need: tensors in one order of memory, and the mask as they read it.

Kernels go through memory as it lies, without a copy, in two orders: rows (contiguous), and sites, where the channels of
a site lie side by side (channels_last). In the second they work out which number of a row an element is.
"""

import torch
from torch import Tensor

MOST = 2**31 - 1
"""Elements of a sample, at most: places within it are 32 bits wide."""


def is_dense(x: Tensor) -> bool:
    """Whether x [B, C, ...] lies in one of the two orders without gaps."""
    return x.is_contiguous() or by_sites(x)


def by_sites(x: Tensor) -> bool:
    """Whether the channels of a site lie side by side, and x is not contiguous too."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def result_like(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(the result with the strides that the reference gives it, where a kernel writes it): mostly one and the same."""
    result = torch.empty_like(x, dtype=dtype)
    return result, result if is_dense(result) else torch.empty(x.shape, dtype=result.dtype, device=x.device)


def finished(result: Tensor, written: Tensor) -> Tensor:
    """The result, once a kernel has written what `result_like` gave."""
    return result if written is result else result.copy_(written)


def in_order_of(written: Tensor, x: Tensor) -> Tensor:
    """x itself if its memory has the order of `written`, else a copy that has."""
    if x.is_contiguous() if written.is_contiguous() else by_sites(x):
        return x
    return torch.empty_like(written, dtype=x.dtype).copy_(x)


def strided_mask(mask: Tensor, pred: Tensor) -> tuple[Tensor, int, int]:
    """The mask with whole sites, and the steps from one row and one channel to the next: 0 where it repeats itself."""
    mask = mask.expand(*mask.shape[:2], *pred.shape[2:]).contiguous()
    sites = pred[:1, :1].numel()
    return mask, mask[0].numel() if mask.shape[0] > 1 else 0, sites if mask.shape[1] > 1 else 0

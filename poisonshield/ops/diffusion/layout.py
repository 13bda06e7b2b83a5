"""What both kernel backends of the diffusion loss need: the mask as they read it."""

from torch import Tensor


def strided_mask(mask: Tensor, pred: Tensor) -> tuple[Tensor, int, int]:
    """The mask with whole sites, and the steps from one row and one channel to the next: 0 where it repeats itself."""
    mask = mask.expand(*mask.shape[:2], *pred.shape[2:]).contiguous()
    sites = pred[:1, :1].numel()
    return mask, mask[0].numel() if mask.shape[0] > 1 else 0, sites if mask.shape[1] > 1 else 0

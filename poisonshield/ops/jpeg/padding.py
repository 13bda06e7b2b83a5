"""How libjpeg pads planes to whole blocks, and the adjoint of it. The two axes of 4:2:0 chrominance differ.

Luminance and 4:4:4 planes repeat their last column and row up to a multiple of 16 (4:2:0) or 8 (4:4:4). 4:2:0
chrominance repeats full-resolution columns to a multiple of 16 but rows only to an even number, is averaged, and then
repeats the last *averaged* row up to a multiple of 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to(planes: Tensor, multiple: int) -> Tensor:
    """[B, C, H, W], both sizes padded to a multiple by repeating the last row and column."""
    return _replicate(planes, -planes.shape[-2] % multiple, -planes.shape[-1] % multiple)


def pad_before_averaging(planes: Tensor) -> Tensor:
    """Full-resolution chrominance: columns to a multiple of 16, rows to an even number."""
    return _replicate(planes, planes.shape[-2] % 2, -planes.shape[-1] % 16)


def pad_chroma_rows(planes: Tensor) -> Tensor:
    """Averaged chrominance: rows to a multiple of 8."""
    return _replicate(planes, -planes.shape[-2] % 8, 0)


def fold(grad: Tensor, h: int, w: int) -> Tensor:
    """The adjoint of repeating the last row and column: what lies beyond h x w is added to the edge."""
    if grad.shape[-2] > h:
        edge = grad[..., h - 1 :, :].sum(-2, keepdim=True)
        grad = edge if h == 1 else torch.cat((grad[..., : h - 1, :], edge), -2)
    if grad.shape[-1] > w:
        edge = grad[..., w - 1 :].sum(-1, keepdim=True)
        grad = edge if w == 1 else torch.cat((grad[..., : w - 1], edge), -1)
    return grad


def _replicate(planes: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(planes, (0, columns, 0, rows), mode="replicate") if rows or columns else planes

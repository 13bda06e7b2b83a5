"""How many directions the features use: the eigenvalues of their uncentred correlation X^T X / n, in float64.

A collapsed or shortcut-ridden encoder puts its energy into few directions.
"""

import torch
from torch import Tensor

_SMALLEST_SHARE = torch.finfo(torch.float32).eps  # 1.19e-7: smaller shares are rounding of float32 features


@torch.no_grad()
def spectrum(h: Tensor) -> Tensor:
    """Eigenvalues of h^T h / n for h [n, D], largest first, float64 [min(n, D)]; the remaining ones are 0."""
    h = h.double()
    gram = h @ h.T if h.shape[0] < h.shape[1] else h.T @ h  # the same nonzero eigenvalues
    return torch.linalg.eigvalsh(gram / h.shape[0]).flip(0).clamp(min=0)


def effective_rank(h: Tensor) -> float:
    """exp of the entropy of the eigenvalues' shares: from 1 (one direction) to D. Not centred; 0 if h is all zero."""
    return rank_of(spectrum(h))


def rank_of(eigenvalues: Tensor) -> float:
    """The effective rank that belongs to eigenvalues, in any order. Shares q up to 1.19e-7 are left out of the sum.

    Source: Roy and Vetterli 2007, on eigenvalues of X^T X / n (squared singular values) as VESPR's authors compute it.
    """
    total = eigenvalues.sum()
    if total <= 0:
        return 0.0
    q = eigenvalues / total
    q = q[q > _SMALLEST_SHARE]
    return float((-(q * q.log()).sum()).exp())


def log_of(eigenvalues: Tensor) -> Tensor:
    """log10 of each eigenvalue's share of the sum, floored at the share below which float32 features only round."""
    share = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return share.clamp(min=_SMALLEST_SHARE).log10()

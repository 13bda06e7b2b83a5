"""How many directions the features use: the eigenvalues of their uncentred correlation X^T X / n, in float64.

A collapsed or shortcut-ridden encoder puts its energy into few directions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.attacks import frozen_stats
from poisonshield.evals.base import Evaluation, Number, Subject

_SMALLEST_SHARE = torch.finfo(torch.float32).eps  # 1.19e-7: smaller shares are rounding of float32 features


class Spectrum(Evaluation[Subject]):
    """How many directions the features of the k-NN bank use."""

    name = "spectrum"
    numbers = (
        Number("effective_rank", "effective rank of features", better="higher", digits=1),
        Number("projection_rank", "effective rank of projections", better="higher", digits=1),
    )

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """projection_rank: of what the projector makes of the features, None without one. log10_shares: see log_of."""
        eigenvalues = spectrum(subject.bank.h)
        projector = subject.method.projection()
        return {
            "effective_rank": rank_of(eigenvalues),
            "projection_rank": None if projector is None else effective_rank(projections(projector, subject.bank.h)),
            "log10_shares": log_of(eigenvalues).tolist(),
        }


@torch.no_grad()
def projections(projector: nn.Module, h: Tensor) -> Tensor:
    """z of features [N, D], evaluation mode, some at a time."""
    with frozen_stats(projector):
        return torch.cat([projector(part) for part in h.split(1000)])


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

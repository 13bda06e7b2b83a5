"""DirectSet: the predictor that training would find, computed from the projections' correlation. Wang et al. 2021.

    C <- momentum C + (1 - momentum) z^T z / B,   C = U diag(l) U^T
    W  = U diag(l^exponent) U^T / max(l)^exponent + offset I
and p = z W, without gradient through W. Exponent 0.5 works; 1 collapses.

Differs from the VESPR authors' code: C is a buffer (saved and resumed), of the global batch and of all views, moved
once per training step and never by an attack or an evaluation, and decomposed in float32 whatever the run's precision.
"""

import torch
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.ops.precision import at_least_float32


class DirectSet(nn.Module):
    """Costs one eigendecomposition [width, width] a step, or every `every` steps."""

    correlation: Tensor
    weight: Tensor
    steps: Tensor

    def __init__(
        self, width: int, *, exponent: float = 0.5, offset: float = 0.3, momentum: float = 0.5, every: int = 1
    ) -> None:
        super().__init__()
        self.exponent, self.offset, self.momentum, self.every = exponent, offset, momentum, every
        self.register_buffer("correlation", torch.zeros(width, width))
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, views: tuple[Tensor, ...], rank_sizes: tuple[int, ...] | None) -> tuple[Tensor, ...]:
        """z W for each view [B, width]. Training mode looks at the batch first."""
        if self.training:
            self._update(views, rank_sizes)
        with torch.autocast(views[0].device.type, enabled=False):
            return tuple(at_least_float32(z) @ self.weight.to(at_least_float32(z).dtype) for z in views)

    @torch.no_grad()
    def _update(self, views: tuple[Tensor, ...], rank_sizes: tuple[int, ...] | None) -> None:
        """Moves the correlation towards this batch's, and the predictor with it every `every` steps."""
        with torch.autocast(views[0].device.type, enabled=False):
            z = torch.cat([at_least_float32(v) for v in views])
            count = len(views) * (sum(rank_sizes) if rank_sizes else len(views[0]) * collectives.world_size())
            seen = collectives.all_reduce_sum(z.T @ z) / count
            first = self.steps == 0  # the first batch is taken whole: an average with zeros would be too small
            self.correlation.copy_(torch.where(first, seen, torch.lerp(seen, self.correlation.to(seen), self.momentum)))
            # A bad batch is the trainer's to judge, by its loss; the decomposition would only fail on it.
            if int(self.steps) % self.every == 0 and bool(self.correlation.isfinite().all()):
                self.weight.copy_(optimal_weight(self.correlation, exponent=self.exponent, offset=self.offset))
            self.steps += 1


def optimal_weight(correlation: Tensor, *, exponent: float, offset: float) -> Tensor:
    """W [D, D] of a symmetric correlation [D, D]."""
    values, vectors = torch.linalg.eigh(correlation)
    values = values.clamp(min=0)  # rounding can leave the smallest below 0, where a fractional power is nan
    scaled = (values / values[-1].clamp(min=torch.finfo(values.dtype).tiny)) ** exponent
    return (vectors * scaled) @ vectors.T + offset * torch.eye(len(values), dtype=values.dtype, device=values.device)

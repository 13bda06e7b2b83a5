"""Batch norm over ranks, for any device: N ranks with B / N samples each normalise as one rank with B would.

torch's own SyncBatchNorm refuses CPU tensors. Here each rank's mean and centred sum of squares travel in one
differentiable gather per layer and are combined by Chan's formula, which keeps float32 accuracy. In evaluation mode
(every attack, unless it asks for batch statistics) there is no communication.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poisonshield import collectives
from poisonshield.errors import BackendError
from poisonshield.ops.precision import at_least_float32


class SyncedBatchNorm(_BatchNorm):
    """Drop-in for BatchNorm1d and BatchNorm2d with the same parameters, buffers and state_dict keys."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm needs [N, C, ...], got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, ...]; N may differ between ranks."""
        if not self.training or collectives.world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        count = x.numel() // x.shape[1]
        wide = at_least_float32(x)
        local_mean = wide.mean(dims)
        centred = (wide - local_mean.view(1, -1, *[1] * (x.dim() - 2))).square().sum(dims)
        stats = torch.cat([local_mean, centred, local_mean.new_full((1,), count)])
        mean, centred, counts = collectives.gather(stats[None]).split(
            [x.shape[1], x.shape[1], 1], dim=1
        )  # [W, C], [W, C], [W, 1]
        total = counts.sum()
        overall = (counts * mean).sum(0) / total
        squares = (centred + counts * (mean - overall).square()).sum(0)
        self._update(overall, squares / (total - 1))
        shape = (1, -1, *[1] * (x.dim() - 2))
        out = (wide - overall.view(shape)) * torch.rsqrt(squares / total + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), momentum)


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every batch norm made to span ranks: torch's own on CUDA, SyncedBatchNorm elsewhere.

    Raises BackendError for a kind that does more than normalise (timm's, with an activation inside): torch's
    conversion would drop what it does not know.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncedBatchNorm)]
    for norm in norms:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
            raise BackendError(
                f"{type(norm).__name__} cannot be synchronised over ranks. "
                "Set model.batch_norm: local (losses then depend on the number of ranks), or take another network."
            )
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in norms:
        norm.__class__ = SyncedBatchNorm  # same attributes: only forward differs
    return module


@contextmanager
def per_view_statistics(module: nn.Module, num_views: int) -> Iterator[None]:
    """Inside, a batch of views stacked one after the other is normalised view by view, as if they came one by one.

    Everything but batch norm then runs once on the long batch. Running statistics move once for each view, in order;
    in evaluation mode there is nothing to keep apart.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kinds = [type(m) for m in norms]
    for norm in norms:
        norm.__class__, norm.num_views = _per_view(type(norm)), num_views
    try:
        yield
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind
            del norm.num_views


@lru_cache
def _per_view(kind: type) -> type:
    def forward(self, x: Tensor) -> Tensor:  # noqa: ANN001
        return torch.cat([kind.forward(self, part) for part in x.chunk(self.num_views)])

    return type(f"PerView{kind.__name__}", (kind,), {"forward": forward})

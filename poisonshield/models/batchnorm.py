"""Batch norm over ranks, for any device: N ranks with B / N samples each normalize as one rank with B would.

torch's own SyncBatchNorm refuses CPU tensors. Here each rank's mean and centred sum of squares travel in one
differentiable gather per layer and are combined by Chan's formula, which keeps float32 accuracy. In evaluation mode
(every attack, unless it asks for batch statistics) there is no communication.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poisonshield import collectives
from poisonshield.errors import BackendError
from poisonshield.ops.precision import at_least_float32


class SyncedBatchNorm(_BatchNorm):
    """Drop-in for BatchNorm1d and BatchNorm2d with the same parameters, buffers and state_dict keys."""

    @classmethod
    def of(cls, norm: _BatchNorm) -> "SyncedBatchNorm":
        """The synced norm in the place of `norm`, with its very parameters and buffers."""
        # On "meta" nothing is allocated for the tensors that are replaced at once.
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        return new.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm needs [N, C, ...], got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, ...]; N may differ between ranks."""
        if not self.training or collectives.world_size() == 1:
            return super().forward(x)
        wide, shape = at_least_float32(x), (1, -1, *[1] * (x.dim() - 2))
        mean, squares, total = _global_moments(wide, shape)
        self._update(mean, squares / (total - 1))
        out = (wide - mean.view(shape)) * torch.rsqrt(squares / total + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        """Moves the running statistics, where there are any, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), momentum)


def _global_moments(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], centred sum of squares [C] and count, a scalar, of all ranks' x [N, C, ...]. shape: of [C] beside x.

    Chan's formula: what a rank's squares lack about the overall mean is its count times its mean's distance, squared.
    """
    channels, dims = x.shape[1], [d for d in range(x.dim()) if d != 1]
    local_mean = x.mean(dims)
    local_squares = (x - local_mean.view(shape)).square().sum(dims)
    stats = torch.cat([local_mean, local_squares, local_mean.new_full((1,), x.numel() // channels)])
    everyones = collectives.gather(stats[None])  # [W, 2 C + 1]
    means, squares, counts = everyones.split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0), total


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every batch norm made to span ranks: torch's own on CUDA, SyncedBatchNorm elsewhere.

    Parameters, buffers and their names stay the same. Raises BackendError for a kind that does more than normalize
    (timm's, with an activation inside): torch's conversion would drop what it does not know.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncedBatchNorm)]
    for norm in norms:
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
            raise BackendError(
                f"{type(norm).__name__} cannot be synchronized over ranks. "
                "Set model.batch_norm: local (losses then depend on the number of ranks), or take another network."
            )
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    synced: dict[nn.Module, nn.Module] = {norm: SyncedBatchNorm.of(norm) for norm in norms}
    # Duplicates too: a norm that has two places in the module is one and the same in both afterwards.
    for path, norm in list(module.named_modules(remove_duplicate=False)):
        if path and norm in synced:
            module.set_submodule(path, synced[norm])
    return synced.get(module, module)


class _StillNorm(torch.autograd.Function):
    """Batch norm in evaluation mode with a gradient for its input alone, which is one factor a channel.

    torch's own backward on a CPU reads everything twice more for the gradients of weight and bias, also where nobody
    asked for them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _BatchNorm) -> Tensor:
        assert norm.running_var is not None
        ctx.save_for_backward(norm.running_var, norm.weight)
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        ctx.eps, ctx.layout = norm.eps, torch.channels_last if last else torch.contiguous_format
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        variance, weight = ctx.saved_tensors
        shape = (1, -1, *[1] * (grads[0].dim() - 2))
        # In float64 and then rounded, and the two factors one after the other: to the bit what torch computes.
        inverse = (1 / (variance.double() + ctx.eps).sqrt()).to(variance.dtype)
        grad = grads[0].contiguous(memory_format=ctx.layout) * inverse.view(shape)
        return grad if weight is None else grad.mul_(weight.view(shape)), None


@contextmanager
def input_gradients_only(*modules: nn.Module) -> Iterator[None]:
    """Inside, batch norm in evaluation mode gives a gradient to its input and none to its weight and bias.

    The same gradient to the bit, at a third of the cost, on float32 tensors of a CPU; elsewhere nothing changes, nor in
    a compiled module, which would be compiled anew for each function that is put into it.
    """
    if any(m._compiled_call_impl is not None for module in modules for m in module.modules()):
        yield
        return
    # Any: see per_view_statistics.
    norms: list[Any] = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, _BatchNorm) and not m.training and m.running_var is not None and "forward" not in vars(m)
    ]
    for norm in norms:
        norm.forward = _still_forward(norm, norm.forward)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _still_forward(norm: _BatchNorm, usual: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        own = x.is_cpu and x.dtype == torch.float32 and torch.is_grad_enabled() and not norm.training
        return _StillNorm.apply(x, norm) if own else usual(x)

    return forward


@contextmanager
def per_view_statistics(module: nn.Module, num_views: int) -> Iterator[None]:
    """Inside, a batch of views stacked one after the other is normalized view by view, as if they came one by one.

    Everything but batch norm then runs once on the long batch. Running statistics move once for each view, in order;
    in evaluation mode there is nothing to keep apart.
    """
    # Any: `forward` is set on each norm itself, in front of its class's own, so modules and their names stay in place.
    norms: list[Any] = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.forward = _view_by_view(norm.forward, num_views)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _view_by_view(forward: Callable[[Tensor], Tensor], num_views: int) -> Callable[[Tensor], Tensor]:
    """The forward that takes the `num_views` equal parts of a batch one after the other."""
    return lambda x: torch.cat([forward(part) for part in x.chunk(num_views)])

"""LARS: SGD in which each tensor's step is measured by its own size, for large batches. Source: You et al. 2017.

    g <- (g + wd w) trust |w| / (|g| + wd |w| + 1e-8)   where neither norm is zero,   then momentum SGD without decay

A tensor of zeros takes the plain gradient; one without gradient stays put. timm's Lars decays the latter at full rate,
a thousand times what the formula gives, which is why this is not it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """Many tensors at once. A group with `adapt: False` is plain momentum SGD, as norms and biases want it.

    One update costs two norms a tensor more than SGD. Every tensor must be whole: the norms of a flattened shard, as
    ZeRO makes them, are not those of a layer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust": trust, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of everything that has a gradient; gradients are left as they are.

        closure: as torch.optim takes it, a function that computes the loss anew and returns it; what it returns is
        returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads, decay = [p.grad for p in params if p.grad is not None], group["weight_decay"]
        steps = list(torch._foreach_add(grads, params, alpha=decay))
        if group["adapt"]:
            torch._foreach_mul_(steps, _compute_ratios(params, grads, decay, group["trust"]))
        if group["momentum"] > 0:
            velocities = [self._get_velocity(p) for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, steps)
            if group["nesterov"]:
                torch._foreach_add_(steps, velocities, alpha=group["momentum"])
            else:
                steps = velocities
        torch._foreach_add_(params, steps, alpha=-group["lr"])

    def _get_velocity(self, p: Tensor) -> Tensor:
        """A running sum of steps, from zero."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return self.state[p]["momentum_buffer"]


def _compute_ratios(params: list[Tensor], grads: list[Tensor], decay: float, trust: float) -> list[Tensor]:
    """What each tensor's decayed gradient is multiplied by, one scalar a tensor; no copy to the host."""
    w, g = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))  # [number of tensors]
    adapted = torch.where(w > 0, trust * w / (g + decay * w + 1e-8), 1.0)
    return list(torch.where(g == 0, 0.0, adapted).unbind())

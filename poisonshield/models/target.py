"""The target branch: a slow copy of encoder and projector that follows the online one. Sources: He et al. 2020 (MoCo); Grill et al. 2020 (BYOL).

    target <- momentum target + (1 - momentum) online,   after each step, parameters only
Its batch statistics are its own, from its own forwards in training mode.
"""

import copy
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from poisonshield.config import Settings


class TargetConfig(Settings):
    """momentum: what the target keeps at each step. momentum_schedule: cosine rises from there to 1 over the run.

    start: copy begins equal to the online branch; random draws new weights, as the VESPR authors' code does.
    stop_gradient: false lets the loss reach the pixels through the target too (its weights never learn).
    """

    momentum: float = Field(0.99, ge=0, le=1)
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    start: Literal["copy", "random"] = "copy"
    stop_gradient: bool = True


class Target(nn.Module):
    """A frozen copy of modules that are applied one after the other."""

    def __init__(self, config: TargetConfig, *online: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(copy.deepcopy(m) for m in online).requires_grad_(False)
        if config.start == "random":
            for module in self.parts.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """What the copy makes of pixels [B, 3, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.stop_gradient):
            for part in self.parts:
                x = part(x)
        return x

    @torch.no_grad()
    def follow(self, *online: nn.Module, progress: float) -> None:
        """One step towards the online modules, given in the order of construction."""
        ours = [p for part in self.parts for p in part.parameters()]
        theirs = [p for module in online for p in module.parameters()]
        torch._foreach_lerp_(
            ours, [t.to(o.dtype) for o, t in zip(ours, theirs, strict=True)], 1 - self.momentum(progress)
        )

    def momentum(self, progress: float) -> float:
        """What is kept after a step that ends at this share of the run."""
        first = self.config.momentum
        if self.config.momentum_schedule == "constant":
            return first
        return 1 - (1 - first) * (1 + math.cos(math.pi * progress)) / 2

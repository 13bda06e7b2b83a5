"""The target branch: a slow copy of encoder and projector that follows the online one.
Sources: He et al. 2020 (MoCo); Grill et al. 2020 (BYOL).

    target <- momentum target + (1 - momentum) online,   after each step, parameters only
Its batch statistics are its own, from its own forwards in training mode.
"""

import copy
import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from poisonshield.config import Settings

Momentum = Annotated[
    float, Field(ge=0, le=1, description="Share of the target's weights that is kept at each step, in [0, 1].")
]


class TargetConfig(Settings):
    """How the target starts and follows."""

    momentum: Momentum = 0.99
    momentum_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="How momentum goes on: constant, or cosine, which rises from there to 1 over the run."
    )
    start: Literal["copy", "random"] = Field(
        "copy",
        description="The target's first weights: copy takes the online branch's; random draws new ones, as the VESPR "
        "authors' code does.",
    )
    stop_gradient: bool = Field(
        True,
        description="Whether the loss stops at the target; false lets it reach the pixels through the target too (its "
        "weights never learn).",
    )


class Target(nn.Module):
    """A frozen copy of modules that are applied one after the other."""

    def __init__(self, config: TargetConfig, *online: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(copy.deepcopy(m) for m in online).requires_grad_(False)
        if config.start == "random":
            for module in self.parts.modules():
                reset = getattr(module, "reset_parameters", None)  # torch's layers have one, containers have not
                if callable(reset):
                    reset()

    def forward(self, x: Tensor) -> Tensor:
        """What the copy makes of pixels [B, 3, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.stop_gradient):
            for part in self.parts:
                x = part(x)
        return x

    @torch.no_grad()
    def follow(self, *online: nn.Module, progress: float) -> None:
        """One step towards the online modules, given in the order of construction."""
        ours: list[Tensor] = [p for part in self.parts for p in part.parameters()]
        theirs: list[Tensor] = [p for module in online for p in module.parameters()]
        cast = [t.to(o.dtype) for o, t in zip(ours, theirs, strict=True)]
        torch._foreach_lerp_(ours, cast, 1 - self.momentum(progress))  # one launch for all, where a loop has hundreds

    def momentum(self, progress: float) -> float:
        """What is kept after a step that ends at this share of the run."""
        first = self.config.momentum
        if self.config.momentum_schedule == "constant":
            return first
        return 1 - (1 - first) * (1 + math.cos(math.pi * progress)) / 2

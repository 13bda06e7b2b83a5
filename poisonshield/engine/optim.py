"""Optimiser settings and parameter groups. Always a torch.optim object, so that no backend compiles one of its own."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn


class OptimConfig(BaseModel):
    """The `optimizer:` section. lr is the peak, for the global batch as it is: nothing rescales it.

    exclude_norm_and_bias: no weight decay on biases and normalisation parameters (all that are one-dimensional).
    clip_norm: largest norm of the whole gradient, null for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    exclude_norm_and_bias: bool = False

    @model_validator(mode="after")
    def _pairs_fit(self) -> "OptimConfig":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name: sgd and a momentum above 0.")
        return self


def parameter_groups(method: nn.Module, config: OptimConfig) -> list[dict]:
    """The trainable parameters of `method`, in one group or, where norms and biases are excluded, in two."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    if not config.exclude_norm_and_bias:
        return [{"params": trainable, "weight_decay": config.weight_decay}]
    decayed, free = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def build_optimizer(method: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of `method`."""
    groups = parameter_groups(method, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)

"""Optimiser settings and parameter groups. Always a torch.optim object, so that no backend compiles one of its own."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from poisonshield.engine.lars import Lars
from poisonshield.errors import ConfigError


class OptimConfig(BaseModel):
    """The `optimizer:` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adamw", "lars"] = Field(
        "sgd",
        description="lars is SGD with a rate for each tensor, but plain and without decay on biases and normalization "
        "parameters.",
    )
    lr: float = Field(
        ge=0, description="The peak, for the global batch as it is: nothing rescales it unless lr_per_256 is set."
    )
    lr_per_256: bool = Field(False, description="lr is meant for 256 samples, and the peak is lr * batch size / 256.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd and lars.")
    nesterov: bool = Field(False, description="Nesterov's form of momentum, for sgd and lars.")
    weight_decay: float = Field(0.0, ge=0, description="Added to gradients by sgd and lars; adamw's is decoupled.")
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; null for none.")
    exclude_norm_and_bias: bool = Field(
        False,
        description="No weight decay on biases and normalization parameters, which are all that have one dimension.",
    )
    constant_predictor_lr: bool = Field(
        False, description="Modules called predictor keep the peak after warm-up, as SimSiam does."
    )
    legacy: bool = Field(
        False,
        description="lars adapts and decays biases and normalization parameters too, as the VESPR authors' code does.",
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> "OptimConfig":
        if self.nesterov and (self.name == "adamw" or self.momentum == 0):
            raise ValueError("nesterov needs name: sgd or lars, and a momentum above 0.")
        if self.legacy and self.name != "lars":
            because = " (AdamW would divide LARS's rate of each tensor out again)" if self.name == "adamw" else ""
            raise ValueError(f"legacy is a form of LARS and does nothing to {self.name}{because}: set name: lars.")
        if self.legacy and self.exclude_norm_and_bias:
            raise ValueError("legacy: true excludes nothing: leave out exclude_norm_and_bias, or legacy.")
        return self

    def for_batch(self, batch_size: int) -> "OptimConfig":
        """The same with lr as the peak itself, for a global batch of this size."""
        if not self.lr_per_256:
            return self
        return self.model_copy(update={"lr": self.lr * batch_size / 256, "lr_per_256": False})

    def check_sharding(self, zero_stage: int) -> None:
        """Raises ConfigError for lars where optimiser states are flat pieces, whose norms are not those of a layer."""
        if self.name == "lars" and zero_stage > 0:
            raise ConfigError(
                f"optimizer.name: lars measures whole tensors, and engine.zero_stage {zero_stage} cuts them into "
                "pieces. Set zero_stage: 0, or optimizer.name: sgd."
            )


def parameter_groups(method: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `method`: one group, and more where norms and biases or the predictor are set apart.

    Raises ConfigError if the predictor's rate is to be kept and there is no predictor that is trained.
    """
    lars = config.name == "lars"
    excludes = config.exclude_norm_and_bias or (lars and not config.legacy)
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in method.named_parameters():
        if p.requires_grad:
            held = config.constant_predictor_lr and "predictor" in name.split(".")
            members.setdefault((held, excludes and p.ndim <= 1), []).append(p)
    if config.constant_predictor_lr and not any(held for held, _ in members):
        raise ConfigError(
            "optimizer.constant_predictor_lr: this method has no module `predictor` that is trained. Leave it out."
        )
    groups = []
    for (held, free), params in sorted(members.items(), key=lambda item: item[0]):
        group = {"params": params, "weight_decay": 0.0 if free else config.weight_decay}
        groups.append(group | ({"constant_lr": True} if held else {}) | ({"adapt": not free} if lars else {}))
    return groups


def set_lr(optimizer: torch.optim.Optimizer, lr: float, constant_lr: float | None = None) -> None:
    """The rate of the step to come, in every group; `constant_lr` where a group keeps the peak after warm-up."""
    for group in optimizer.param_groups:
        group["lr"] = constant_lr if group.get("constant_lr") and constant_lr is not None else lr


def build_optimizer(method: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of `method`. Raises ConfigError if lr is still per 256 samples.

    fused: move all weights in one kernel, which torch has for sgd and adamw; lars goes its own way.
    """
    if config.lr_per_256:
        raise ConfigError("optimizer.lr is per 256 samples: pass optimizer.for_batch(batch_size), which has the peak.")
    groups = parameter_groups(method, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused or None
    )

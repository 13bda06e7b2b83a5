"""How a run is executed: backend, precision, length, disk. A file of its own, as trainer and backends both read it.

What a backend can and cannot do is said in its own file; here the settings are held against what it says.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from poisonshield.registry import Registry, suggest

backends = Registry("poisonshield.engine.backends", kind="engine backend")


class EngineConfig(BaseModel):
    """The `engine:` section. Its length is `epochs`, or exactly `max_steps` where that is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field("plain", description="What runs the steps: a file of engine/backends.")
    zero_stage: int = Field(
        0,
        ge=0,
        le=3,
        description="What is cut into pieces, one a rank: 1 the optimiser's state, 2 gradients too, 3 weights too; 0 "
        "nothing. A backend has some of these stages.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 computes under autocast; weights, buffers and the optimiser's state stay float32."
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the stream.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps; wins over epochs.")
    accumulate: int = Field(
        1, ge=1, description="Batches of the stream in one optimiser step; their gradients are averaged."
    )
    checkpoint_every_steps: int | None = Field(
        None, ge=1, description="Steps between two checkpoints, beside those that checkpoint_minutes asks for."
    )
    checkpoint_minutes: float | None = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Minutes by rank 0's clock after which the next step is followed by a checkpoint; null for none. A "
        "run saves at its end and when it is told to stop in any case.",
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many checkpoints stay on the disk, the newest ones.")
    log_every_steps: int = Field(20, ge=1, description="Steps of one line on the console and in metrics.jsonl.")
    resume: Literal[False] | str = Field(
        False,
        description="false starts anew; auto goes on from the run folder's last good checkpoint, if there is one; "
        "anything else is the path of a run folder or of one checkpoint.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where each process computes; auto takes its GPU if it has one. cuda fails without."
    )
    channels_last: bool = Field(False, description="Keep weights in the channels-last layout, quicker on some GPUs.")
    fused_optimizer: bool | None = Field(
        None,
        description="Whether sgd and adamw move all weights in one kernel, which may change the last bit; null does so "
        "on a GPU.",
    )
    compile: bool = Field(
        False,
        description="Put the method's encoder under torch.compile, in training and in attacks. The first steps compile "
        "for minutes, once for each size of batch; numbers change by rounding, and dropout draws others. Meant for a "
        "GPU: on a CPU it was slower than without.",
    )
    cudnn_benchmark: bool = Field(
        False,
        description="On a GPU, time several algorithms of each convolution at its first call and keep the fastest; "
        "runs may then differ in their last bits.",
    )
    tf32: bool | None = Field(
        None,
        description="Whether float32 products on a GPU may round their factors to 10 bits (TF32); null is torch's own "
        "choice: convolutions may, other products may not.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite: stop ends the run before it moves a weight, skip "
        "drops the step. On a GPU, stop reads a step's verdict while the next one runs; nothing moves meanwhile.",
    )
    nonfinite_limit: int = Field(10, ge=1, description="How many steps skip may drop; with one more the run ends.")
    tensorboard: bool = Field(False, description="Write TensorBoard files too; metrics.jsonl has the same numbers.")
    timeout_minutes: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="How long ranks wait for each other before the run fails: when they meet, and in each message. The "
        "longest honest wait is that for rank 0 to hash a large checkpoint.",
    )
    late_factor: float = Field(
        20.0,
        gt=1,
        allow_inf_nan=False,
        description="A step that takes this many times its usual time, and at least half a minute, is told, with the "
        "ranks that have not come.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of each process; null is torch's own choice.")

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, name: str) -> str:
        known = backends.names()
        if name not in known:
            raise ValueError(f"{name!r} is not an engine backend.{suggest(name, known)}  Known: {', '.join(known)}")
        return name

    @field_validator("resume", mode="before")
    @classmethod
    def _check_resume(cls, value: object) -> object:
        if value is True or value == "":
            raise ValueError("resume takes false, auto, or the path of a run folder or checkpoint.")
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> "EngineConfig":
        if self.epochs is None and self.max_steps is None:
            raise ValueError("how long to train is not said: set epochs or max_steps.")
        chosen: Any = backends.get(self.backend)
        if self.zero_stage not in chosen.zero_stages:
            able = _join_names(b for b in _get_all_backends() if self.zero_stage in b.zero_stages)
            has = "shards nothing" if chosen.zero_stages == (0,) else f"has stages {chosen.zero_stages}"
            raise ValueError(f"zero_stage {self.zero_stage} needs backend: {able}; {self.backend} {has}.")
        if self.nonfinite == "skip" and not chosen.drops_steps:
            able = _join_names(b for b in _get_all_backends() if b.drops_steps)
            raise ValueError(
                f"nonfinite: skip needs backend: {able}; {self.backend} cannot drop a step whole. Use stop."
            )
        chosen.check(self)
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many optimiser steps the run has."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None  # one of the two is set
        return max(1, self.epochs * steps_per_epoch // self.accumulate)


def _get_all_backends() -> list[Any]:
    return [backends.get(name) for name in backends.names()]


def _join_names(found: Iterable[Any]) -> str:
    return " or ".join(backend.name for backend in found)

"""How a run is executed: backend, precision, length, disk. A file of its own, as trainer and backends both read it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from poisonshield.registry import Registry, suggest

backends = Registry("poisonshield.engine.backends", kind="engine backend")


class EngineConfig(BaseModel):
    """The `engine:` section. Length is `epochs`, or exactly `max_steps` where that is set.

    accumulate: batches of one optimiser step, their gradients averaged; a step is then that many batches of the stream.
    resume: false starts anew, auto goes on from the run folder's last good checkpoint if there is one, anything else is
    the path of a run folder or of one checkpoint. checkpoint_every_steps null saves at the end and on a signal only.
    nonfinite: `stop` ends the run before a bad step moves weights; `skip` drops it, at most nonfinite_limit times.
    threads: CPU threads of each process, null for torch's choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = "plain"
    zero_stage: int = Field(0, ge=0, le=3)
    precision: Literal["fp32", "bf16"] = "fp32"
    epochs: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    accumulate: int = Field(1, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every_steps: int = Field(20, ge=1)
    resume: Literal[False] | str = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    channels_last: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = Field(10, ge=1)
    tensorboard: bool = False
    threads: int | None = Field(None, ge=1)

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        known = backends.names()
        if name not in known:
            raise ValueError(f"{name!r} is not an engine backend.{suggest(name, known)}  Known: {', '.join(known)}")
        return name

    @field_validator("resume", mode="before")
    @classmethod
    def _resume_names_something(cls, value: object) -> object:
        if value is True or value == "":
            raise ValueError("resume takes false, auto, or the path of a run folder or checkpoint.")
        return value

    @model_validator(mode="after")
    def _pairs_fit(self) -> "EngineConfig":
        if self.epochs is None and self.max_steps is None:
            raise ValueError("how long to train is not said: set epochs or max_steps.")
        if self.zero_stage > 0 and self.backend != "deepspeed":
            raise ValueError(f"zero_stage {self.zero_stage} needs backend: deepspeed; {self.backend} shards nothing.")
        if self.backend == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 with deepspeed needs zero_stage 1, 2 or 3: stage 0 has no sharded float32 copy of the "
                "weights and drifts. Without sharding, backend: plain does the same work."
            )
        if self.backend == "deepspeed" and self.nonfinite == "skip":
            raise ValueError("nonfinite: skip needs backend: plain; deepspeed cannot drop a step whole. Use stop.")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many optimiser steps the run has."""
        return self.max_steps or max(1, self.epochs * steps_per_epoch // self.accumulate)

"""Learning rate as a pure function of the step: nothing to save, nothing to get out of step on resume.

Time runs in ticks, counted from 1 to N: a tick is one step, or one epoch with `per_epoch: true`. Warm-up raises the
rate linearly, tick t of w giving lr * t / w. Cosine spans the whole run and is not restarted after warm-up, as in
VESPR's code: at tick t >= w it is lr * (1 + cos(pi (t - 1) / N)) / 2.
"""

import math
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScheduleConfig(BaseModel):
    """The `schedule:` section. At most one of the three warm-ups is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["cosine", "one_cycle", "step", "constant"] = Field(
        "cosine", description="How the rate goes on after warm-up; one_cycle's rising part is its warm-up."
    )
    warmup_steps: int | None = Field(None, ge=0, description="Length of the warm-up in optimiser steps.")
    warmup_epochs: float | None = Field(None, ge=0, description="Length of the warm-up in epochs.")
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="Length of the warm-up as a part of the run; one_cycle takes 0.3 if none is set."
    )
    per_epoch: bool = Field(False, description="The rate changes once an epoch, and not with each step.")
    final_fraction: float = Field(0.0, ge=0, le=1, description="Where cosine and one_cycle end, as a part of lr.")
    start_fraction: float = Field(0.04, gt=0, le=1, description="Where one_cycle begins, as a part of lr.")
    milestones: tuple[float, ...] = Field(
        (0.6, 0.75, 0.9),
        description="For step: parts m of a run of N ticks; from tick m * N on, the rate is multiplied by gamma.",
    )
    gamma: float = Field(0.2, gt=0, le=1, description="For step: what the rate is multiplied by at each milestone.")

    @model_validator(mode="after")
    def _check_pairs(self) -> "ScheduleConfig":
        given = [n for n in ("warmup_steps", "warmup_epochs", "warmup_fraction") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long warm-up is: keep one.")
        if self.per_epoch and self.warmup_steps is not None:
            raise ValueError("per_epoch: true counts in epochs: use warmup_epochs or warmup_fraction.")
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones are rising fractions of the run, each between 0 and 1.")
        return self

    def warmup_ticks(self, ticks: int, steps_per_epoch: int | Fraction) -> float:
        """How many ticks of the whole run's `ticks` belong to warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return self.warmup_epochs if self.per_epoch else round(self.warmup_epochs * steps_per_epoch)
        default = 0.3 if self.name == "one_cycle" else 0.0
        return (default if self.warmup_fraction is None else self.warmup_fraction) * ticks


def lr_at(
    config: ScheduleConfig,
    *,
    lr: float,
    step: int,
    total_steps: int,
    steps_per_epoch: int | Fraction,
    decay: bool = True,
) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`; `lr` is the peak, which stays without decay.

    steps_per_epoch: not a whole number where steps take several batches each and an epoch ends within one.
    """
    tick, ticks = step + 1, total_steps
    if config.per_epoch:
        tick, ticks = step // steps_per_epoch + 1, math.ceil(total_steps / steps_per_epoch)
    warmup = config.warmup_ticks(ticks, steps_per_epoch)
    if config.name == "one_cycle":
        final = config.final_fraction if decay else 1.0
        return lr * _follow_one_cycle(tick, ticks, warmup, config.start_fraction, final)
    if tick < warmup:
        return lr * tick / warmup
    if not decay:
        return lr
    if config.name == "cosine":
        return lr * _interpolate(1.0, config.final_fraction, (tick - 1) / ticks)
    if config.name == "step":
        passed = sum(tick >= milestone * ticks - 1e-9 for milestone in config.milestones)
        return lr * config.gamma**passed
    return lr


def _interpolate(start: float, end: float, part: float) -> float:
    """Half a cosine wave from start (part 0) to end (part 1)."""
    return end + (start - end) * (1.0 + math.cos(math.pi * part)) / 2.0


def _follow_one_cycle(tick: int, ticks: int, warmup: float, start: float, final: float) -> float:
    """Up from start to 1 over `warmup` ticks, then down to final at the last, each half a cosine wave (Smith 2018)."""
    top, last, now = warmup - 1, ticks - 1, tick - 1
    if now < top:
        return _interpolate(start, 1.0, now / top)
    return _interpolate(1.0, final, (now - top) / (last - top)) if last > top else 1.0

"""What happens when loss or gradient is not finite: all ranks agree before any weight moves, then stop or skip."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import PoisonShieldError

log = logging.getLogger(__name__)


class NonFiniteError(PoisonShieldError, FloatingPointError):
    """A loss or gradient was infinite or not a number; the weights are those of the step before."""


class Verdict(NamedTuple):
    """What all ranks agreed on at a step boundary."""

    finite: bool
    stop: bool
    interrupted: bool = False
    save: bool = False


class FiniteGuard:
    """Judges each step on all ranks at once. Costs one message of four numbers and one wait for the device a step.

    The questions "was anyone told to stop, by Ctrl-C?" and "is it time to save?" ride along, so that all ranks act on
    a signal and on rank 0's clock at the same step.
    """

    def __init__(self, policy: str, limit: int) -> None:
        self.policy, self.limit, self.skipped = policy, limit, 0

    def judge(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        keys: Sequence[str],
        *,
        stop: bool,
        interrupted: bool = False,
        save: bool = False,
    ) -> Verdict:
        """Agree on step `step` (from 0). Raises NonFiniteError under `stop`, or after too many skips."""
        bad = ~(loss.isfinite() & norm.isfinite())
        flags = torch.cat([bad.reshape(1), torch.tensor([stop, interrupted, save], device=bad.device)])
        any_bad, *told = collectives.any_rank(flags).tolist()
        if any_bad:
            self._refuse_or_skip(step, loss, norm, keys)
        return Verdict(not any_bad, *told)

    def _refuse_or_skip(self, step: int, loss: Tensor, norm: Tensor, keys: Sequence[str]) -> None:
        world = collectives.world_size()
        losses, norms = collectives.gather(torch.stack([loss, norm]).detach().float().reshape(1, 2)).T.tolist()
        culprit = next((r for r, value in enumerate(losses) if not math.isfinite(value)), None)
        worst = next((value for value in norms if not math.isfinite(value)), norms[0])
        if culprit is None and world > 1:  # gradients are summed over ranks by now: nobody knows whose it was
            what = f"step {step + 1}: gradient norm {worst} after a finite loss on each of {world} ranks"
        else:
            culprit = culprit or 0
            names = collectives.broadcast_object([*keys[:4], "..."] if len(keys) > 4 else list(keys), source=culprit)
            what = f"step {step + 1}: loss {losses[culprit]}, gradient norm {worst} on rank {culprit} of {world}"
            what += f", samples {', '.join(names)}"
        self.skipped += 1
        if self.policy == "skip" and self.skipped <= self.limit:
            log.warning("%s. The step was dropped (%d of at most %d).", what, self.skipped, self.limit)
            return
        allowed = f" after {self.limit} dropped steps" if self.policy == "skip" else ""
        raise NonFiniteError(
            f"{what}{allowed}.\n  No weight moved; the last checkpoint is from before. Lower optimizer.lr, set "
            "optimizer.clip_norm, or engine.nonfinite: skip to go on without such steps."
        )

"""What happens when loss or gradient is not finite: all ranks agree before any weight moves, then stop or skip.

A verdict that is read makes the host wait for the device, in every step, with nothing left to do for either. A late
guard leaves the decision on the device: `broken` is what an optimiser reads there, not 0 from the first bad step on, so
that nothing moves any more; the host reads the verdict of a step while the next one runs, and stops then.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import PoisonShieldError
from poisonshield.transfer import Letter, send

log = logging.getLogger(__name__)


class NonFiniteError(PoisonShieldError, FloatingPointError):
    """A loss or gradient was infinite or not a number; the weights are those of the step before."""


class Verdict(NamedTuple):
    """What all ranks agreed on at a step boundary."""

    finite: bool
    stop: bool
    interrupted: bool = False
    save: bool = False

    def joined(self, other: "Verdict") -> "Verdict":
        """Of two steps, what was asked for after either."""
        finite, *asked = zip(self, other, strict=True)
        return Verdict(all(finite), *map(any, asked))


@dataclass(frozen=True)
class Case:
    """A step whose verdict is on its way. numbers: loss and gradient norm, [2], on the device."""

    step: int
    letter: Letter
    numbers: Tensor
    keys: Sequence[str]


class FiniteGuard:
    """Judges each step on all ranks at once. Costs one message of four numbers, and one wait for the device a step.

    The questions "was anyone told to stop, by Ctrl-C?" and "is it time to save?" ride along, so that all ranks act on
    a signal and on rank 0's clock at the same step. late: give a step's verdict at the next one; needs policy stop.
    """

    def __init__(self, policy: str, limit: int, *, late: bool = False) -> None:
        assert not late or policy == "stop"  # a step that is to be dropped must be known before the next one
        self.policy, self.limit, self.skipped, self.late = policy, limit, 0, late
        self.broken: Tensor | None = None
        """Late: float32 [] on the device, 1 from the first bad step on; nothing may move there."""
        self._open: Case | None = None

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
        """Agree on step `step` (from 0). Raises NonFiniteError under `stop`, or after too many skips.

        Late: `broken` counts this step in, and the verdict is that of the step before.
        """
        numbers = torch.stack([loss.detach(), norm.detach()]).float()
        told = send(torch.tensor([stop, interrupted, save]), numbers.device)
        flags = collectives.any_rank(torch.cat([~numbers.isfinite().all().reshape(1), told]))
        case = Case(step, Letter(flags), numbers, keys)
        if not self.late:
            return self._decide(case)
        bad = flags[0].float()
        self.broken = bad if self.broken is None else torch.maximum(self.broken, bad)
        verdict, self._open = self.settle(), case
        return verdict

    def settle(self) -> Verdict:
        """The verdict that is still on its way, if there is one; before anything of a step is written down."""
        case, self._open = self._open, None
        return Verdict(True, False) if case is None else self._decide(case)

    def _decide(self, case: Case) -> Verdict:
        any_bad, *told = case.letter.read()
        if any_bad:
            self._refuse_or_skip(case.step, case.numbers, case.keys)
        return Verdict(not any_bad, *told)

    def _refuse_or_skip(self, step: int, numbers: Tensor, keys: Sequence[str]) -> None:
        world = collectives.world_size()
        losses, norms = collectives.gather(numbers.reshape(1, 2)).T.tolist()
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

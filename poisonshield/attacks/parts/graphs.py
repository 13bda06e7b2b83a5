"""An ascent as one CUDA graph: recorded once, then started by the host with a single launch.

An attack of ten steps on a ResNet-18 starts some 1,700 small kernels, which takes the host longer than a GPU needs to
run them. A graph reads and writes fixed places in memory: pixels and inputs are copied into buffers of its own before
each replay, and the result is copied out after it. Weights are read where they lie, so an optimiser that moves them in
place is seen, and weights that lie elsewhere ask for a new graph.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from poisonshield.attacks.base import Repeated
from poisonshield.attacks.parts.budgets import Budget

log = logging.getLogger(__name__)

Ascent = Callable[[Callable[..., Tensor], Tensor, Tensor], None]
"""Moves x_adv (second) in place up the objective (first), around x (third), without asking the device anything."""

MOST = 4  # graphs of one attack; each keeps the memory of a forward and backward pass


def record(work: Callable[[], None]) -> Callable[[], None]:
    """What starts `work` again on the GPU; recording runs nothing. The one place that touches CUDA's graphs."""
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # a weight cast while recording holds no numbers yet: nobody else may find it
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may copy and wait meanwhile
            work()
    finally:
        torch.clear_autocast_cache()
    return graph.replay


class _Recorded:
    """One graph with its buffers."""

    def __init__(self, ascent: Ascent, objective: Repeated, x_adv: Tensor, x: Tensor) -> None:
        self.x_adv, self.x = x_adv.clone(), x.clone()
        self.inputs = tuple(v.clone() for v in objective.inputs)
        fixed = Repeated(objective.loss, self.inputs, objective.reads)
        self.replay = record(lambda: ascent(fixed, self.x_adv, self.x))

    def run(self, objective: Repeated, x_adv: Tensor, x: Tensor) -> None:
        self.x_adv.copy_(x_adv)
        self.x.copy_(x)
        for own, given in zip(self.inputs, objective.inputs, strict=True):
            own.copy_(given)
        self.replay()
        x_adv.copy_(self.x_adv)


class Graphs:
    """The recorded ascents of one attack, one for each kind of call; it decides which calls are worth one.

    The first call of a kind runs step by step, which also warms up whatever a recording must not meet cold; the second
    records. A copy of an attack starts without any.
    """

    def __init__(self, wish: Literal["on", "off"] | None) -> None:
        self.wish = wish
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._said: set[str] = set()
        self._given_up = False

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return Graphs(self.wish)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.wish,)

    def run(
        self, ascent: Ascent, objective: Callable[..., Tensor], x_adv: Tensor, x: Tensor, budget: Budget,
        *, unfit: str | None = None,
    ) -> None:  # fmt: skip
        """Move x_adv as `ascent(objective, x_adv, x)` does. unfit: why the attack's settings do not allow a graph."""
        reason = "it is off" if self.wish == "off" else unfit or _refusal(objective, x_adv)
        if reason is not None or not isinstance(objective, Repeated):
            self.say(reason)
            ascent(objective, x_adv, x)
            return
        found = self._find(ascent, objective, x_adv, x, budget)
        if found is None:
            ascent(objective, x_adv, x)
        else:
            found.run(objective, x_adv, x)

    def _find(self, ascent: Ascent, objective: Repeated, x_adv: Tensor, x: Tensor, budget: Budget) -> _Recorded | None:
        """The graph of this kind of call; None where there is none yet, or is to be none."""
        kind = _kind_of(objective, x_adv, x, budget)
        self._calls[kind] += 1
        if kind in self._recorded or self._calls[kind] < 2 or self._given_up:
            return self._recorded.get(kind)
        if len(self._recorded) == MOST:
            self.say(f"{MOST} kinds of batches have one, and this is another kind", always=True)
            return None
        try:
            self._recorded[kind] = _Recorded(ascent, objective, x_adv, x)
        except RuntimeError as err:  # torch's, for work that cannot be recorded
            self._given_up = True
            self.say(f"recording failed: {str(err).splitlines()[0]}", always=True)
        return self._recorded.get(kind)

    def say(self, reason: str | None, *, always: bool = False) -> None:
        """Why an ascent runs step by step: once for each reason, where somebody asked for graphs, or always."""
        if reason is not None and (always or self.wish == "on") and reason not in self._said:
            self._said.add(reason)
            log.warning("The attack runs step by step and not as a CUDA graph: %s.", reason)


def _refusal(objective: Callable[..., Tensor], x: Tensor) -> str | None:
    """Why this call cannot be recorded, or None."""
    if not x.is_cuda:
        return f"the pixels are on {x.device}"
    if not isinstance(objective, Repeated):
        return "its objective does not say which tensors it depends on"
    if any(v.numel() == 0 for v in objective.reads):
        return "weights lie in pieces, elsewhere at each step"
    return None


def _kind_of(objective: Repeated, x_adv: Tensor, x: Tensor, budget: Budget) -> Hashable:
    """What a recording takes for granted."""
    tensors = tuple((v.shape, v.stride(), v.dtype, v.device) for v in (x_adv, x, *objective.inputs))
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return objective.loss, tuple(v.data_ptr() for v in objective.reads), tensors, type(budget), budget, cast

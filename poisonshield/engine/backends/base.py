"""What the engine needs from a backend, and what a backend says of itself, so that nobody asks for its name.

The file `backends/<name>.py` holds the class with that `name`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.whole import Saved, Whole
from poisonshield.method import Method


class Backend(Protocol):
    """Runs the steps of one method on all ranks; every call is made by all of them together.

    One `forward_backward` is one forward and one backward of one module: whatever a method does inside its forward
    (inner attacks, several views) goes through its own submodules and never through a distributed wrapper.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # what `poisonshield doctor` says of it in a few words
    packages: ClassVar[tuple[str, ...]] = ()  # must be installed; each is also the name of an extra of this package
    zero_stages: ClassVar[tuple[int, ...]] = (0,)  # what `engine.zero_stage` may be
    drops_steps: ClassVar[bool] = True  # whether `discard` works, which `engine.nonfinite: skip` needs
    needs_group: ClassVar[bool] = False  # a process group even for one process alone; it then stays open to the end

    method: Method  # as built, without wrappers
    order: tuple[str, ...]  # names of the trained parameters as the optimiser of whole tensors numbers them

    def __init__(self, config: EngineConfig, optimizer: OptimConfig, device: torch.device) -> None: ...

    @classmethod
    def check(cls, engine: EngineConfig) -> None:
        """Raise ValueError for settings that this backend cannot serve together. Called when settings are read."""

    @classmethod
    def derived(cls, engine: EngineConfig, optimizer: OptimConfig) -> str | None:
        """The settings that this backend makes from ours, as text for `--print-config`; None if it makes none.

        Raises ConfigError if it cannot serve these two sections together.
        """
        return None

    @classmethod
    def prepare_process(cls, device: torch.device) -> None:
        """Set what this process needs before the group is joined, and before the backend's package is imported."""

    def describe(self) -> str:
        """How the backend is called in the lines before the first step."""
        return self.name

    def prepare(self, method: Method) -> None:
        """Take over a method that sits on the device, and build its optimiser."""

    def forward_backward(self, batch: Batch, *, part: int = 0) -> StepOutput:
        """Loss and gradients of part `part` of a step's `accumulate`; those of part 0 replace the old ones, others add
        up, to the mean of all. The output is detached."""

    def clip(self) -> Tensor:
        """Clip gradients (now or in `step`); a scalar that is finite exactly if this rank's gradients are."""

    def step(
        self, lr: float, progress: float, *, constant_lr: float | None = None, unless: Tensor | None = None
    ) -> None:
        """Move the weights, then let the method do its `after_step`. constant_lr: for groups that keep the peak.

        unless: float32 [], on the device; where it is not 0 nothing moves. Only given where `can_hold`.
        """

    @property
    def can_hold(self) -> bool:
        """Whether `step` takes `unless`. Asked after `prepare`."""
        return False

    def discard(self) -> None:
        """Drop the gradients of the last forward_backward, and what its forward did to buffers."""

    def save(self, folder: Path) -> None:
        """Write method and optimiser; each rank its own files, or rank 0 all."""

    def fits(self, saved: Saved) -> bool:
        """Whether `load` reads, bit for bit, what was saved so. What does not fit is read whole. Asked after
        `prepare`."""
        return False

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, where it `fits`. Raises CheckpointError."""

    @classmethod
    def read_whole(cls, folder: Path, saved: Saved, order: Sequence[str]) -> Whole:
        """What `save` of this class wrote on whatever ranks, in whole tensors on the CPU. No rank needs another for it.

        order: of the run that reads. Raises CheckpointError, and what a damaged file may raise.
        """
        raise NotImplementedError

    def load_whole(self, whole: Whole) -> None:
        """Go on from there. All ranks have the same. Raises CheckpointError if it is of another method."""

    def state_dict(self) -> dict[str, Tensor]:
        """The whole method's state in float32 or as stored, on the CPU of rank 0; empty on other ranks."""

"""What the engine needs from a backend, and what a backend says of itself, so that nobody asks for its name.

The file `backends/<name>.py` holds the class with that `name`.
"""

from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.settings import EngineConfig
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

    def load(self, folder: Path, saved_world: int) -> None:
        """Read what `save` wrote with `saved_world` ranks. Raises CheckpointError if it cannot serve these ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """The whole method's state in float32 or as stored, on the CPU of rank 0; empty on other ranks."""

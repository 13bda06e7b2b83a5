"""PyTorch and nothing else: one process, or DistributedDataParallel where torchrun started several."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.checkpoint import load_plain, save_plain
from poisonshield.engine.optim import OptimConfig, build_optimizer, set_lr
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.whole import Saved, Whole, name_states, names_in_order, put_states, put_weights
from poisonshield.method import Method

# torch 2.14 renamed it.
_BUFFER_SWITCH = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class Plain(Backend):
    """Every rank holds everything; a checkpoint is rank 0's copy and fits any number of ranks."""

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "one process, or DDP where torchrun starts several"

    def __init__(self, config: EngineConfig, optimizer: OptimConfig, device: torch.device) -> None:
        self.config, self.optim_config, self.device = config, optimizer, device
        self._buffers_before: list[Tensor] = []

    def prepare(self, method: Method) -> None:
        """Build the optimiser; wrap in DistributedDataParallel where there are several ranks."""
        self.method = method
        wish = self.config.fused_optimizer
        self.fused = self.optim_config.name != "lars" and (self.device.type == "cuda" if wish is None else wish)
        self.optimizer = build_optimizer(method, self.optim_config, fused=self.fused)
        self.order = names_in_order(method, self.optimizer)
        self.wrapper: DistributedDataParallel | None = None
        if collectives.world_size() > 1:
            # Buffers are not broadcast: batch statistics are either synced in the forward or meant to be local.
            # No device_ids: the batch is on the device already, and DDP would try to take a Batch apart.
            options: dict[str, Any] = {_BUFFER_SWITCH: False}
            self.wrapper = DistributedDataParallel(method, **options)

    def forward_backward(self, batch: Batch, *, part: int = 0) -> StepOutput:
        """Forward under autocast (bf16) or not, one backward. Ranks exchange gradients in a step's last part only."""
        if part == 0:
            if self.config.nonfinite == "skip":
                self._buffers_before = [b.clone() for b in self.method.buffers()]
            self.optimizer.zero_grad(set_to_none=True)
        module = self.method if self.wrapper is None else self.wrapper
        more_to_come = part < self.config.accumulate - 1
        with self.wrapper.no_sync() if self.wrapper is not None and more_to_come else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                output = module(batch)
            (output.loss / self.config.accumulate).backward()
        return StepOutput(output.loss.detach(), {k: v.detach() for k, v in output.metrics.items()})

    def clip(self) -> Tensor:
        """The norm of the whole gradient, clipped where the settings ask for it."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        limit = self.optim_config.clip_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(parameters, limit)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    @property
    def can_hold(self) -> bool:
        """A fused optimiser reads on the device whether to move, and the method must not move anything by itself."""
        return self.fused and not self.method.acts_after_step

    def step(
        self, lr: float, progress: float, *, constant_lr: float | None = None, unless: Tensor | None = None
    ) -> None:
        """One optimiser step at this rate."""
        set_lr(self.optimizer, lr, constant_lr)
        vars(self.optimizer)["found_inf"] = unless  # where fused kernels look, as torch's gradient scaler tells them
        self.optimizer.step()
        self.method.after_step(progress)

    def discard(self) -> None:
        """Gradients dropped, buffers as before the forward."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.method.buffers(), self._buffers_before, strict=False):
                buffer.copy_(before)

    def save(self, folder: Path) -> None:
        """method.pt and optimizer.pt, by rank 0."""
        if collectives.rank() == 0:
            save_plain(self.method.state_dict(), folder / "method.pt")
            save_plain(self.optimizer.state_dict(), folder / "optimizer.pt")

    def fits(self, saved: Saved) -> bool:
        """Any number of ranks."""
        return saved.backend == self.name

    def load(self, folder: Path) -> None:
        """The same files, on any number of ranks."""
        self.method.load_state_dict(load_plain(folder / "method.pt"))
        state = load_plain(folder / "optimizer.pt")
        for group in state["param_groups"]:
            group["fused"] = self.fused or None  # the file has the choice of the run that wrote it
        self.optimizer.load_state_dict(state)

    @classmethod
    def read_whole(cls, folder: Path, saved: Saved, order: Sequence[str]) -> Whole:
        """Whole as it is; the optimiser's numbers become names."""
        return Whole(load_plain(folder / "method.pt"), name_states(load_plain(folder / "optimizer.pt"), order))

    def load_whole(self, whole: Whole) -> None:
        """A copy on every rank."""
        put_weights(self.method, whole.weights)
        put_states(self.optimizer, whole.states, self.order)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        if collectives.rank() != 0:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.method.state_dict().items()}

"""The training loop: one method over one stream, on any backend, saved whole and resumed exactly.

It knows ranks, time and disk, and nothing of poisons, defenses or data formats. engine/README.md tells the order of
events, and what a checkpoint holds.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import poisonshield
from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput, Stream
from poisonshield.engine import checkpoint
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.compiling import compile_parts
from poisonshield.engine.guards import FiniteGuard, Verdict
from poisonshield.engine.meeting import current
from poisonshield.engine.metrics import Metrics
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import choose_device, seed_everything
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig, lr_at
from poisonshield.engine.settings import EngineConfig, backends
from poisonshield.engine.signals import Preempted, StopSignals
from poisonshield.engine.tally import Tally
from poisonshield.engine.watch import Watch
from poisonshield.engine.whole import Saved
from poisonshield.errors import CheckpointError
from poisonshield.method import Method

log = logging.getLogger(__name__)


class Trainer:
    """Runs `method` over `stream` to the last step. Build and use it inside `processes(config, seed=seed)`.

    fixed_record: the resolved config, plain values only; it goes to config.yaml and into every checkpoint.
    watch: numbers to log beside each interval's means, asked of every rank at its end; it may read the method only.
    """

    def __init__(
        self,
        method: Method,
        stream: Stream,
        config: EngineConfig,
        *,
        optimizer: OptimConfig,
        schedule: ScheduleConfig,
        run_folder: RunFolder,
        seed: int,
        fixed_record: dict[str, Any],
        watch: Callable[[], Mapping[str, float | None]] | None = None,
    ) -> None:
        self.method, self.stream, self.config, self.seed = method, stream, config, seed
        self.optim_config, self.schedule = optimizer, schedule
        self.folder, self.fixed_record, self.watch = run_folder, fixed_record, watch
        self.device = choose_device(config.device)
        self.backend: Backend = backends.get(config.backend)(config, optimizer, self.device)
        self.checkpoints = checkpoint.Checkpoints(run_folder.checkpoints, keep=config.keep_checkpoints)
        self.guard = FiniteGuard(config.nonfinite, config.nonfinite_limit)
        self.judges_late = self.device.type == "cuda" and config.nonfinite == "stop"
        self.tally = Tally(stream.steps_per_epoch, self.device)
        self.signs = Watch(current(), config.late_factor)
        self.step, self.total_steps = 0, config.total_steps(stream.steps_per_epoch)

    def fit(self) -> dict[str, Any]:
        """Train to the last step; {"steps", "seconds", and the last line's numbers}.

        Raises Preempted (exit code 75, or 130 after Ctrl-C) after saving if told to stop, NonFiniteError before a bad
        step moves a weight, BusyError if another process works in the run folder.
        """
        with self.folder.held(), StopSignals() as signals:
            self._start()
            try:
                with self.signs.on():
                    self._loop(signals)
            finally:
                self.metrics.close()
        return {**self.metrics.latest, "steps": self.step, "seconds": self.metrics.seconds}

    def _loop(self, signals: StopSignals) -> None:
        batches = iter(self.stream)
        while self.step < self.total_steps:
            batch = self.gather(batches)
            with self.signs.at(self.step + 1):
                parts = [(self.backend.forward_backward(batch, part=0), batch)]
                for i in range(1, self.config.accumulate):
                    batch = self.gather(batches)
                    parts.append((self.backend.forward_backward(batch, part=i), batch))
                norm = self.backend.clip()
                verdict = self._agree(parts, norm, signals)
            lr = self.lr()
            if verdict.finite:
                self._move_weights(parts, lr)
            else:
                self.backend.discard()
            for _, batch in parts:
                self.tally.add(batch.epoch, batch.keys, trained=verdict.finite)
            self.step += 1
            self._end_step(lr, verdict)

    def gather(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, on the device."""
        before = self.stream.stage_seconds
        with self.metrics.waiting():
            batch = next(batches).to(self.device, non_blocking=True)
        self.metrics.add_stages(self.stream.stage_seconds - before)
        return batch

    def _agree(self, parts: list[tuple[StepOutput, Batch]], norm: torch.Tensor, signals: StopSignals) -> Verdict:
        """What all ranks think of this step's loss and gradient, whether one was told to stop, and if it is time to
        save."""
        loss = torch.stack([output.loss for output, _ in parts]).mean()
        keys = tuple(key for _, batch in parts for key in batch.keys)
        told = {"stop": signals.caught, "interrupted": signals.interrupted, "save": self._is_time_to_save()}
        return self.guard.judge(self.step, loss, norm, keys, **told)

    def _is_time_to_save(self) -> bool:
        """By the clock of rank 0, so that no clocks have to agree."""
        minutes = self.config.checkpoint_minutes
        if minutes is None or collectives.rank() > 0:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    def _move_weights(self, parts: list[tuple[StepOutput, Batch]], lr: float) -> None:
        """One optimiser step, which is counted in the metrics."""
        progress, unless = (self.step + 1) / self.total_steps, self.guard.broken
        self.backend.step(lr, progress, constant_lr=self.lr(decay=False), unless=unless)
        for output, batch in parts:
            self.metrics.add(output, batch)

    def _end_step(self, lr: float, verdict: Verdict) -> None:
        """Log and save what is due after a step; raises Preempted if told to stop before the last one."""
        done = self.step == self.total_steps
        due = done or (self.metrics.count > 0 and self.step % self.config.log_every_steps == 0)
        every = self.config.checkpoint_every_steps
        saves = done or verdict.stop or verdict.save or (every is not None and self.step % every == 0)
        if due or saves:
            verdict = verdict.joined(self.guard.settle())  # nothing of a bad step is written down
        if due:
            watched = None if self.watch is None else self.watch()
            self.metrics.write(self.step, lr, watched, self.tally.take(last=done))
        if saves or verdict.stop or verdict.save:
            self.save()
        if verdict.stop and not done:
            raise Preempted(self.step, interrupted=verdict.interrupted)

    def lr(self, *, decay: bool = True) -> float:
        """The learning rate of the step to come; without decay, for what keeps the peak after warm-up."""
        peak, total, epoch = self.optim_config.lr, self.total_steps, self._steps_per_epoch
        return lr_at(self.schedule, lr=peak, step=self.step, total_steps=total, steps_per_epoch=epoch, decay=decay)

    @property
    def _steps_per_epoch(self) -> Fraction:
        """The stream counts batches, and a step may take several; it need not be whole."""
        return Fraction(self.stream.steps_per_epoch, self.config.accumulate)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole method's state on the CPU of rank 0, whatever shards it; empty on other ranks. All ranks call."""
        return self.backend.state_dict()

    def _start(self) -> None:
        """From objects to the first step: hand the method over, go back to where a run stopped, claim the folder.

        Nothing is claimed before all is checked, so that a run that is refused leaves the folder as it was.
        """
        config, resume = self.config, self.config.resume
        check = partial(self.folder.check, self.fixed_record, resume=resume)
        anew = checkpoint.together(check, only_first=True, what=f"checking {self.folder.path}")
        seed_everything(self.seed + collectives.rank())
        self.method.to(self.device).train()
        if config.channels_last:
            self.method.to(memory_format=torch.channels_last)
        if config.compile:
            compile_parts(self.method)
        self.backend.prepare(self.method)
        self.guard.late = self.judges_late and self.backend.can_hold
        self.metrics = Metrics(self.folder, self.device, total_steps=self.total_steps, tensorboard=config.tensorboard)
        found = None if anew and resume == "auto" else self._find_checkpoint(resume)
        if found is not None:
            self._load(found)
        claim = partial(self.folder.claim, self.fixed_record, resume=resume)
        checkpoint.together(claim, only_first=True, what=f"claiming {self.folder.path}")
        ours = found is None or found.parent.resolve() == self.checkpoints.folder.resolve()
        self.checkpoints.go_back_to(self.step if ours else -1)  # another run's start leaves all of this one's behind
        self._announce(found)
        self.metrics.start(self.step)
        self._saved_at = time.monotonic()

    def _find_checkpoint(self, resume: str | Literal[False]) -> Path | None:
        """Where the run goes on from, None for the beginning."""
        if not resume:
            return None
        return self.checkpoints.last_good() if resume == "auto" else checkpoint.locate(Path(resume))

    def save(self) -> Path:
        """Write a checkpoint of this step boundary. All ranks call."""
        record = {
            "world_size": collectives.world_size(),
            "backend": self.backend.name,
            "zero_stage": self.config.zero_stage,
            "versions": {"poisonshield": poisonshield.__version__, "torch": torch.__version__},
            "config": self.fixed_record,
        }
        tally = self.tally.state_dict()
        path = self.checkpoints.save(self.step, record, partial(self._write, tally))
        self._saved_at = time.monotonic()
        return path

    def _write(self, tally: dict[str, Any], folder: Path) -> None:
        rank = collectives.rank()
        state = {
            "random": checkpoint.random_states(),
            "stream": self.stream.state_dict(),
            "metrics": self.metrics.state_dict(),
            "skipped": self.guard.skipped,
            "tally": tally,
            # Batch statistics and queues may differ between ranks; the backend keeps those of rank 0.
            "buffers": dict(self.method.named_buffers()) if rank > 0 else {},
        }
        checkpoint.save_plain(state, folder / f"rank-{rank}.pt")
        self.backend.save(folder)

    def _load(self, folder: Path) -> None:
        index, rank = checkpoint.read_index(folder), collectives.rank()
        saved = Saved(index["backend"], index["zero_stage"], index["world_size"])
        same_ranks = saved.world_size == collectives.world_size()
        if self.backend.fits(saved):
            self.backend.load(folder)
        else:
            self._load_whole(folder, saved, index["config"])
        state = checkpoint.load_plain(folder / f"rank-{rank if same_ranks else 0}.pt")
        self.step, self.guard.skipped = index["step"], state["skipped"]
        self.stream.load_state_dict(state["stream"])
        self.metrics.load_state_dict(state["metrics"], same_ranks=same_ranks)
        self.tally.load_state_dict(state.get("tally"))
        if same_ranks:
            checkpoint.restore_random_states(state["random"])
            buffers = dict(self.method.named_buffers())
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        else:
            seed_everything(self.seed + rank + 7919 * self.step)
            log.warning("%s has %d ranks, this run %d: global random states start anew.", folder, index["world_size"],
                        collectives.world_size())  # fmt: skip

    def _load_whole(self, folder: Path, saved: Saved, config: dict[str, Any]) -> None:
        """Weights and optimiser of another backend, stage or number of ranks; config: with which they were trained."""
        name = (config.get("optimizer") or {}).get("name", self.optim_config.name)
        if name != self.optim_config.name:
            raise CheckpointError(
                f"{folder} was written with optimizer.name: {name}, this run has {self.optim_config.name}, which has "
                "no use for what the other one kept of each weight.\n  Resume with the same optimizer."
            )
        writer: type[Backend] = backends.get(saved.backend)
        read = partial(writer.read_whole, folder, saved, self.backend.order)
        self.backend.load_whole(checkpoint.together(read, what=f"reading {folder}"))
        log.info("%s was written by %s; this run is equal up to rounding.", folder, saved)

    def _announce(self, found: Path | None) -> None:
        world = collectives.world_size()
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        trainable = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        log.info("%s, %s trainable parameters", type(self.method).__name__, f"{trainable:,}")
        log.info("%d x %s on %s, backend %s, %s, torch %s", world, where, socket.gethostname(),
                 self.backend.describe(), self.config.precision, torch.__version__)  # fmt: skip
        log.info("steps %d to %d (%g an epoch), %s", self.step + 1, self.total_steps, self._steps_per_epoch,
                 f"resumed from {found}" if found else "from the start")  # fmt: skip
        log.info("results go to %s", self.folder.path)

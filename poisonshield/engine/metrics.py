"""One steady line per interval: console, metrics.jsonl and, if asked for, TensorBoard, all under the same names.

Sums stay on the device and are read once an interval, so logging makes no step wait. Each value is the mean over the
interval's steps, averaged over ranks. Seconds run on over resumes. Where epochs ended in the interval, the line in
metrics.jsonl has `samples`, which tells of each what it trained on (see tally.py).
"""

import json
import logging
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import BackendError
from poisonshield.files import tell_of_disk, write_whole

log = logging.getLogger(__name__)


class Metrics:
    """Collects what steps report and writes it at intervals. All ranks call `write`; rank 0 writes."""

    def __init__(self, folder: RunFolder, device: torch.device, *, total_steps: int, tensorboard: bool) -> None:
        self.folder, self.device, self.total_steps = folder, device, total_steps
        self.sums: dict[str, torch.Tensor] = {}
        self.count = self.images = 0
        self.seconds = 0.0  # of the whole run
        self.latest: dict[str, Any] = {}  # the last row
        self._wait_s = self._stage_s = 0.0
        self._since, self._since_step = time.perf_counter(), 0
        self._wants_board, self._board = tensorboard and collectives.rank() == 0, None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is reported as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    def add_stages(self, seconds: float) -> None:
        """So much of the waiting was for poisons and views that the host made or asked for."""
        self._stage_s += seconds

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Count one step."""
        for name, value in {"loss": output.loss, **output.metrics}.items():
            value = value.detach().to(torch.float32)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.images += sum(batch.rank_sizes) if batch.rank_sizes else len(batch) * collectives.world_size()

    def write(
        self,
        step: int,
        lr: float,
        watched: Mapping[str, float | None] | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Report the interval that ends with `step` (from 1), and what was `watched` at its end, and start the next.

        samples: what epochs that ended trained on.
        """
        means = collectives.all_reduce_mean(self.sums)
        numbers = torch.stack(list(means.values())).tolist() if means else []  # read at once, which waits once
        row: dict[str, Any] = {"step": step, **{k: v / self.count for k, v in zip(means, numbers, strict=True)}}
        row |= {k: v for k, v in (watched or {}).items() if v is not None} | {"lr": lr}
        now = time.perf_counter()
        elapsed = now - self._since
        self.seconds += elapsed
        row["img/s"] = self.images / elapsed
        row["data"] = 100.0 * (self._wait_s - self._stage_s) / elapsed
        row["augment"] = 100.0 * self._stage_s / elapsed
        row["mem"] = _measure_memory_gib(self.device)
        row["left"] = elapsed / (step - self._since_step) * (self.total_steps - step)
        row["seconds"] = self.seconds
        if samples:
            row["samples"] = list(samples)
        self.sums, self.count, self.images = {}, 0, 0
        self._wait_s = self._stage_s = 0.0
        self._since, self._since_step = now, step
        self.latest = row
        if collectives.rank() == 0:
            self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        log.info(console_line(row, self.total_steps))
        with tell_of_disk(self.folder.metrics), self.folder.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name in row.keys() - {"step", "samples"}:
                self._board.add_scalar(name, row[name], row["step"])

    def state_dict(self) -> dict[str, Any]:
        """The unfinished interval and the clock, so that a resumed run reports what an uninterrupted one would."""
        sums = {k: v.cpu() for k, v in self.sums.items()}
        seconds = self.seconds + time.perf_counter() - self._since
        return {"sums": sums, "count": self.count, "seconds": seconds, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any], *, same_ranks: bool) -> None:
        """Put back what state_dict gave; with another number of ranks the unfinished interval is let go."""
        if same_ranks:
            self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
            self.count = state["count"]
        self.seconds, self.latest = state["seconds"], state["latest"]

    def start(self, step: int) -> None:
        """Set-up is over, time counts from now, after `step`. Later lines, written by a run that died, are dropped."""
        if self._wants_board:
            self._board = _open_tensorboard(self.folder.tensorboard)
        if collectives.rank() == 0:
            drop_lines_after(self.folder.metrics, step)
        self._since, self._since_step = time.perf_counter(), step

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def console_line(row: dict[str, Any], total_steps: int) -> str:
    """The fixed columns: step, loss and its parts, lr, img/s, data wait, memory, time left."""
    width = len(str(total_steps))
    fixed = {"step", "lr", "img/s", "data", "augment", "mem", "left", "seconds", "samples"}
    parts = [f"step {row['step']:>{width}}/{total_steps}"]
    parts += [f"{name} {value:.2f}" for name, value in row.items() if name not in fixed]
    parts += [f"lr {row['lr']:.3f}" if row["lr"] >= 0.01 or row["lr"] == 0 else f"lr {row['lr']:.1e}"]
    parts += [f"img/s {row['img/s']:.0f}", f"data {row['data']:.1f}%", f"mem {row['mem']:.1f} GiB"]
    parts += [f"left {duration(row['left'])}"]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """2h41m, 3m05s or 12s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines of a metrics.jsonl up to `step`; a last line that was cut off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            log.warning("%s: dropping a line that was cut off.", path)
    write_whole(path, "".join(kept))


def _measure_memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise BackendError(
            "engine.tensorboard is true but tensorboard is not installed.\n"
            "  pip install '.[tensorboard]', or set it to false: metrics.jsonl holds the same numbers."
        ) from err
    return SummaryWriter(str(folder))

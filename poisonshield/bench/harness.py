"""One way to measure everything: checked first, warmed up, in interleaved rounds, with memory and operations counted.

Rounds go through all providers in turn, so that drift of the machine meets all alike. On CUDA the L2 cache is flushed
before each run and events take the time. Extra memory is the peak above what was there before: on CUDA as the
allocator saw it, on the CPU by torch's profiler. Operations are kernels on CUDA, and on the CPU aten operations other
than views, allocations and copies.
"""

import datetime
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from poisonshield.errors import PoisonShieldError


class WrongResult(PoisonShieldError, ArithmeticError):
    """A provider's result is not what it should be, so timing it would mean nothing."""


@dataclass
class Provider:
    """Someone who can do it."""

    name: str
    run: Callable[[], object] | None
    """What is timed; None where it cannot be done here."""
    check: Callable[[], str] = lambda: ""
    """A remark on the result. Raises WrongResult if it is not what it should be."""
    missing: str = ""
    """Why it cannot be done here."""


@dataclass
class Case:
    """What is measured."""

    name: str
    shape: tuple[int, ...]
    ideal_bytes: int
    """What must be read and written at least; 0 where no traffic is claimed."""
    peer: str
    """The provider whose time ratios refer to."""
    providers: list[Provider] = field(default_factory=list)
    dtype: str = "float32"


@dataclass
class Row:
    """One line of the CSV."""

    case: str
    provider: str
    shape: str
    dtype: str
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    ideal_bytes: int
    gb_per_s: float | None
    copy_pct: float | None
    extra_mib: float | None
    launches: int | None
    note: str
    device: str
    driver: str
    threads: int
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    @property
    def times(self) -> tuple[float, float, float] | None:
        """p20, p50 and p80 in milliseconds; None for a provider that was skipped."""
        if self.p20_ms is None or self.p50_ms is None or self.p80_ms is None:
            return None
        return self.p20_ms, self.p50_ms, self.p80_ms


def measure(case: Case, *, rounds: int, copy: float) -> list[Row]:
    """Check, then time every provider of a case. copy: bytes per second of a copy in this run."""
    here = {p.name: p.run for p in case.providers if p.run is not None}
    notes = {p.name: p.check() for p in case.providers if p.run is not None}
    for run in here.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in here}
    for _ in range(rounds):
        for name, run in here.items():
            times[name].append(_time(run))
    rows = []
    for p in case.providers:
        if p.run is None:
            rows.append(_row(case, p.name, None, copy, None, None, f"skipped: {p.missing}"))
        else:
            extra, launches = _count(p.run)
            rows.append(_row(case, p.name, sorted(times[p.name]), copy, extra, launches, notes[p.name]))
    return rows


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of copying 128 MiB, both directions counted; the median of 20."""
    x = torch.ones(1 << 25, device=device)
    y = torch.empty_like(x)
    times = [_time(lambda: y.copy_(x)) for _ in range(22)][2:]
    return 2 * x.nbytes / (statistics.median(times) / 1e3)


def _row(
    case: Case,
    provider: str,
    times: list[float] | None,
    copy: float,
    extra: float | None,
    launches: int | None,
    note: str,
) -> Row:
    p20 = p50 = p80 = speed = None
    if times:
        p20, p50, p80 = (times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        speed = case.ideal_bytes / (p50 / 1e3)
    return Row(
        case.name, provider, "x".join(map(str, case.shape)), case.dtype, p20, p50, p80, case.ideal_bytes,
        None if speed is None else speed / 1e9, None if speed is None else 100 * speed / copy, extra, launches, note,
        **_machine(),
    )  # fmt: skip


def _time(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    _flush_l2()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@cache
def _spoiler() -> torch.Tensor:
    """What is written to, so that nothing else stays in the cache."""
    return torch.empty(1 << 26, dtype=torch.int32, device="cuda")  # 256 MiB, larger than any L2


def _flush_l2() -> None:
    _spoiler().zero_()


def _count(run: Callable[[], object]) -> tuple[float, int]:
    """Peak extra MiB, and how many operations or kernels."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        launches = sum(e.count for e in seen.key_averages() if "memcpy" not in e.key.lower())
        return (torch.cuda.max_memory_allocated() - before) / 2**20, launches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = peak = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        peak = max(peak, now)
    counted = (e for e in seen.key_averages() if e.key.startswith("aten::") and e.key[6:] not in _NO_WORK)
    return peak / 2**20, sum(e.count for e in counted)


# Views, allocations and copies, which are not counted as operations on the CPU.
_NO_WORK = frozenset(
    "view expand slice select unbind transpose permute as_strided detach alias t reshape unflatten flatten empty "
    "empty_like empty_strided resize_ to _to_copy copy_ contiguous clone lift_fresh resolve_conj _reshape_alias "
    "unsqueeze squeeze expand_as view_as narrow split chunk".split()
)


@cache
def _machine() -> dict[str, Any]:
    """The last columns of a Row, which are the same in a whole run."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD") or "",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

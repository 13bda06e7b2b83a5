"""One way to measure everything: checked first, warmed up, in interleaved rounds, with memory and operations counted.

Rounds go through all providers in turn, so that drift of the machine meets all alike. On CUDA the L2 cache is flushed
before each run and events take the time. Extra memory is the peak above what was there before: on CUDA as the
allocator saw it, on the CPU by torch's profiler. Operations are kernels on CUDA, and on the CPU aten operations other
than views, allocations and copies.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch.profiler import ProfilerActivity, profile

from poisonshield.bench.machine import describe
from poisonshield.errors import PoisonShieldError

CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class Target:
    """How fast a provider has to be: `must` times as fast as `against`, another provider of the case.

    against "% copy": at least so many percent of the speed of copying. most: it may take at most `must` times as long.
    """

    provider: str
    against: str
    must: float
    most: bool = False


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
    items: int = 0
    """Samples that one run goes through; 0 where they are not counted."""
    targets: list[Target] = field(default_factory=list)
    counted: bool = True
    """Whether memory and operations are counted, by one more run under the profiler."""


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
    items_per_s: float | None
    verdict: str
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


def measure(
    case: Case, *, rounds: int, copy: float = 1.0, cap: float | None = None, device: torch.device = CPU
) -> list[Row]:
    """Check, then time every provider of a case. copy: bytes per second of a copy in this run.

    cap: seconds that each provider may take; one that needs more for its check and first run is not timed, another has
    fewer rounds, and both say so.
    """
    runners = [_Runner(p, p.run, cap, device) for p in case.providers if p.run is not None]
    for runner in runners:
        runner.check()
    for runner in runners:
        runner.warm_up()
    for _ in range(rounds):
        for runner in runners:
            runner.time_once()
    known = {r.provider.name: r for r in runners}
    return [_row(case, p, known.get(p.name), rounds, copy, device) for p in case.providers]


@dataclass
class _Runner:
    """One provider's turns, and the seconds that they took."""

    provider: Provider
    run: Callable[[], object]
    cap: float | None
    device: torch.device
    spent: float = 0.0
    note: str = ""
    times: list[float] = field(default_factory=list)

    def check(self) -> None:
        """Its result is right, or WrongResult."""
        with self._counting():
            self.note = self.provider.check()

    def warm_up(self) -> None:
        """The first run, which compiles and allocates."""
        if not self.is_late():
            with self._counting():
                self.run()

    def time_once(self) -> None:
        """One more round, while there is time."""
        if not self.is_late():
            with self._counting():
                self.times.append(_time(self.run, self.device))

    def is_late(self) -> bool:
        """Whether the cap is used up."""
        return self.cap is not None and self.spent >= self.cap

    @contextmanager
    def _counting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent += time.perf_counter() - start

    def say(self, rounds: int) -> str:
        """The note, and what the cap left out."""
        if not self.times:
            return f"stopped: check and first run took {self.spent:.1f} s, the cap is {self.cap:g} s"
        if len(self.times) < rounds:
            return "; ".join(filter(None, (self.note, f"{len(self.times)} of {rounds} rounds in {self.cap:g} s")))
        return self.note


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of copying 128 MiB, both directions counted; the median of 20."""
    x = torch.ones(1 << 25, device=device)
    y = torch.empty_like(x)
    times = [_time(lambda: y.copy_(x), device) for _ in range(22)][2:]
    return 2 * x.nbytes / (statistics.median(times) / 1e3)


def _row(case: Case, provider: Provider, runner: _Runner | None, rounds: int, copy: float, device: torch.device) -> Row:
    times = sorted(runner.times) if runner else []
    p20 = p50 = p80 = traffic = extra = launches = None
    if runner and times:
        p20, p50, p80 = (times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        traffic = case.ideal_bytes / (p50 / 1e3) if case.ideal_bytes else None
        extra, launches = _count(runner.run, device) if case.counted else (None, None)
    return Row(
        case.name, provider.name, "x".join(map(str, case.shape)), case.dtype, p20, p50, p80, case.ideal_bytes,
        None if traffic is None else traffic / 1e9, None if traffic is None else 100 * traffic / copy, extra, launches,
        case.items / (p50 / 1e3) if p50 and case.items else None, "",
        runner.say(rounds) if runner else f"skipped: {provider.missing}", **describe(device),
    )  # fmt: skip


def _time(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Milliseconds of one run."""
    if device.type != "cuda":
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


def _count(run: Callable[[], object], device: torch.device = CPU) -> tuple[float, int]:
    """Peak extra MiB, and how many operations or kernels."""
    gc.collect()
    if device.type == "cuda":
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

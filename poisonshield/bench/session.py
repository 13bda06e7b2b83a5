"""One call of `poisonshield bench`: times case after case, keeps each at once, judges it, and says what failed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from poisonshield.bench.harness import CPU, Case, Row, Target, copy_bandwidth, measure
from poisonshield.bench.record import append

_OF_OTHERS = {"cpu": ("triton", "cuda"), "cuda": ("cpu",)}
"""Backends of ops that are for another kind of device: nothing is amiss where they are skipped."""


@dataclass
class Session:
    """Settings of the timing, the rows so far, and the faults: what missed its target, was left out or cut short.

    cap: seconds for each provider of a case. quick: sizes are small, so nothing is judged.
    """

    device: torch.device = CPU
    out: Path | None = None
    rounds: int = 15
    cap: float | None = None
    quick: bool = False
    allow_missing: bool = False
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @cached_property
    def copy(self) -> float:
        """Bytes per second of copying here and now."""
        return copy_bandwidth(self.device)

    def time(self, case: Case, remark: Callable[[Row], str] = lambda row: row.note) -> list[Row]:
        """Check, time and judge a case; its rows are in the CSV before the next one starts. remark: the note of a row
        that was timed. Raises WrongResult if a provider does something else."""
        copy = self.copy if case.ideal_bytes else 1.0
        rows = measure(case, rounds=self.rounds, copy=copy, cap=self.cap, device=self.device)
        rows = [replace(r, verdict=self._judge(case, r, rows), note=remark(r) if r.times else r.note) for r in rows]
        for row in rows:
            if row.times is None and not self.allow_missing and row.provider not in _OF_OTHERS[self.device.type]:
                self.faults.append(f"{case.name}: {row.provider} {row.note}")
        self.rows += rows
        if self.out is not None:
            append(self.out, rows)
        return rows

    def _judge(self, case: Case, row: Row, rows: list[Row]) -> str:
        wanted = [t for t in case.targets if t.provider == row.provider]
        if self.quick or row.times is None:
            return ""
        verdicts = [v for v in (judge(t, row, rows) for t in wanted) if v]
        self.faults += [f"{case.name}: {row.provider} {v}" for v in verdicts if v.startswith("BELOW")]
        return "; ".join(verdicts)

    def close(self) -> int:
        """Say what failed; the exit code."""
        if self.faults:
            Console(width=160, highlight=False).print("\n".join(["", f"{len(self.faults)} failed:", *self.faults]))
            if any("BELOW" not in fault for fault in self.faults):
                Console(width=160, highlight=False).print("To go without what is missing: --allow-missing")
        return 1 if self.faults else 0


def judge(target: Target, row: Row, rows: list[Row]) -> str:
    """`met ...` or `BELOW ...` with the figure and what was wanted; empty where the other side was not timed."""
    other = next((r.times for r in rows if r.provider == target.against), None)
    if target.against == "% copy":
        value, said = row.copy_pct, "% of copy"
    elif other is None or row.times is None:
        return ""
    elif target.most:
        value, said = row.times[1] / other[1], f"times as long as {target.against}"
    else:
        value, said = other[1] / row.times[1], f"times as fast as {target.against}"
    if value is None:
        return ""
    met = value <= target.must if target.most else value >= target.must
    bound = "at most" if target.most else "at least"
    return f"{'met' if met else 'BELOW'}: {value:.2f} {said}, {bound} {target.must:g} wanted"


def show(case: Case, rows: list[Row]) -> None:
    """One table per case, with the ratio to the peer that it names."""
    peer = next((r.p50_ms for r in rows if r.provider == case.peer and r.p50_ms), None)
    first = rows[0]
    where = f"{first.device}, {first.threads} threads, torch {first.torch}"
    table = Table(title=f"{case.name}  {case.shape}  {where}", title_justify="left")
    times = ("p20 ms", "p50 ms", "p80 ms", f"x {case.peer}")
    for column in ("provider", *times, "items/s", "GB/s", "% copy", "extra MiB", "ops", "note"):
        table.add_column(column, justify="left" if column in ("provider", "note") else "right")
    for r in rows:
        if r.times is None:
            table.add_row(r.provider, *[""] * 9, r.note)
            continue
        ratio = "" if peer is None else f"{peer / r.times[1]:.2f}"
        figures = (f"{v:.2f}" for v in r.times)
        traffic = (_short(r.items_per_s), _short(r.gb_per_s, 1), _short(r.copy_pct), _short(r.extra_mib))
        launches = "" if r.launches is None else str(r.launches)
        note = "; ".join(filter(None, (r.verdict, r.note)))
        table.add_row(r.provider, *figures, ratio, *traffic, launches, note)
    Console(width=160).print(table)


def _short(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"

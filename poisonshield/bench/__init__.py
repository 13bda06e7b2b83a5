"""`poisonshield bench ops`: our ops beside other libraries, in one run, checked before they are timed.

Each file here that defines `cases(device, quick)` is a benchmark; a new op is a new file. vespr.py is a command of its
own, `poisonshield bench vespr`, and so is inversion.py, `poisonshield bench invert`: whole training steps.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from poisonshield.bench.harness import Case, Row, copy_bandwidth, measure
from poisonshield.bench.record import append, plot
from poisonshield.errors import ConfigError


def benchmarks() -> list[str]:
    """The names of the ops that have a file here."""
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(n for n in names if n not in ("harness", "record", "vespr", "inversion"))


def bench(
    ops: Sequence[str], out: Path, figure: Path | None, rounds: int, quick: bool, threads: int | None
) -> list[Row]:
    """Time the ops, print a table, append rows to a CSV and draw a plot."""
    unknown = set(ops) - set(benchmarks())
    if unknown:
        raise ConfigError(f"no benchmark for {', '.join(sorted(unknown))}. Known: {', '.join(benchmarks())}")
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copy = copy_bandwidth(device)
    rows = []
    for name in ops or benchmarks():
        for case in importlib.import_module(f"{__name__}.{name}").cases(device, quick):
            found = measure(case, rounds=rounds, copy=copy)
            show(case, found)
            rows += found
    append(out, rows)
    if figure is not None:
        plot(figure, rows)
    return rows


def show(case: Case, rows: list[Row]) -> None:
    """One table per case, with the ratio to the peer that it names."""
    peer = next((r.p50_ms for r in rows if r.provider == case.peer and r.p50_ms), None)
    table = Table(title=f"{case.name}  {case.shape}  {rows[0].device}", title_justify="left")
    times = ("p20 ms", "p50 ms", "p80 ms", f"x {case.peer}")
    for column in ("provider", *times, "GB/s", "% copy", "extra MiB", "ops", "note"):
        table.add_column(column, justify="left" if column in ("provider", "note") else "right")
    for r in rows:
        if r.times is None:
            table.add_row(r.provider, *[""] * 8, r.note)
            continue
        ratio = "" if peer is None else f"{peer / r.times[1]:.2f}"
        figures = (f"{v:.2f}" for v in r.times)
        traffic = f"{r.gb_per_s:.1f}", f"{r.copy_pct:.0f}", f"{r.extra_mib:.0f}", str(r.launches)
        table.add_row(r.provider, *figures, ratio, *traffic, r.note)
    Console(width=160).print(table)

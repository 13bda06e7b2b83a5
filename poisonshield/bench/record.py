"""Rows to a CSV that grows, and a plot of one run."""

import csv
from dataclasses import asdict, fields
from pathlib import Path

from poisonshield.bench.harness import Row
from poisonshield.errors import DataError


def append(path: Path, rows: list[Row]) -> None:
    """Add rows; the file is made with a header where it is missing. Raises DataError if its columns are other ones."""
    names = [f.name for f in fields(Row)]
    if path.is_file():
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != names:
            raise DataError(f"{path} has other columns ({', '.join(found[:3])}, ...). Give --out another file.")
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if new:
            writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def plot(path: Path, rows: list[Row]) -> None:
    """A bar per provider (median, with p20 to p80), a panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r.case for r in rows))
    figure, axes = plt.subplots(len(cases), 1, figsize=(8, 1.2 + 2.2 * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        timed = [r for r in rows if r.case == case and r.p50_ms is not None]
        spread = [[r.p50_ms - r.p20_ms for r in timed], [r.p80_ms - r.p50_ms for r in timed]]
        axis.barh([r.provider for r in timed], [r.p50_ms for r in timed], xerr=spread, color="#4a7ba6")
        axis.invert_yaxis()
        axis.set_title(f"{case}, {timed[0].shape}, {timed[0].device}" if timed else case, fontsize=9, loc="left")
        axis.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

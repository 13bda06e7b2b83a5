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
        timed = [(r.provider, r.times) for r in rows if r.case == case and r.times is not None]
        spread = [[p50 - p20 for _, (p20, p50, _) in timed], [p80 - p50 for _, (_, p50, p80) in timed]]
        axis.barh([name for name, _ in timed], [p50 for _, (_, p50, _) in timed], xerr=spread, color="#4a7ba6")
        axis.invert_yaxis()
        first = next(r for r in rows if r.case == case)
        axis.set_title(f"{case}, {first.shape}, {first.device}" if timed else case, fontsize=9, loc="left")
        axis.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

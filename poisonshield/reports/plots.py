"""Pictures of runs, drawn without a display."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poisonshield.engine.runfolder import RunFolder
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.parts.numbers import columns_of, numbers_of, values_of


def _figure(columns: int, width: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, 3.4), constrained_layout=True)


def plot_run(folder: RunFolder) -> Path:
    """Writes results.png of one run: losses and shortcut diagnostics over steps, and accuracy by readout.

    Diagnostics: how alike the encoder finds an attacked and a plain view (VESPR logs it), or a clean and a poisoned
    image (evaluate.watch_pairs), and how much more the attacked view, or the clean image, costs the classifier.
    """
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rows = json.loads(folder.results.read_text())
    curves = {
        "training loss": ("loss", "ssl", "ce"),
        "cosine of features": ("psn_cln_sim", "attack_similarity"),
        "cross-entropy gap": ("ce_gap", "attack_ce_gap"),
    }
    curves = {k: names for k, names in curves.items() if any(n in line for line in lines for n in names)}
    figure, (*left, right) = _figure(len(curves) + 1, 4.2 * (len(curves) + 1))
    for axis, (what, names) in zip(left, curves.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(xlabel="step", ylabel=what, title=folder.path.name)
        axis.legend()
    _bars(right, [rows[-1]], [f"seed {rows[-1]['seed']}"])
    return _save(figure, folder.path / "results.png")


def plot_probes(folder: RunFolder) -> Path:
    """Writes probes.png of one run from evaluation.json: the spectrum of the features, and the bars of each panel that
    Numbers name."""
    measured = json.loads((folder.path / "evaluation.json").read_text())
    panels = _panels(values_of(measured, EVALUATIONS))
    spectrum = measured["spectrum"]
    count = len(panels) + (spectrum is not None)
    figure, axes = _figure(max(1, count), 4.2 * max(1, count))
    left = list(axes) if count > 1 else [axes]
    if spectrum is not None:
        _plot_spectrum(left.pop(0), spectrum)
    for axis, (title, bars) in zip(left, panels.items(), strict=False):
        axis.bar_label(axis.bar(list(bars), list(bars.values())), fmt="%.3g", fontsize=8)
        axis.set_title(title)
    return _save(figure, folder.path / "probes.png")


def _panels(values: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """{title: {label: value}} of the known numbers that belong to bars."""
    panels: dict[str, dict[str, float]] = {}
    for number in numbers_of(EVALUATIONS):
        value = values[number.key]
        if number.panel is not None and value is not None:
            panels.setdefault(number.panel, {})[number.label] = value
    return panels


def _plot_spectrum(axis: Any, spectrum: Mapping[str, Any]) -> None:
    axis.plot(range(1, len(spectrum["log10_shares"]) + 1), spectrum["log10_shares"])
    axis.set(xlabel="eigenvalue", ylabel="log10 of its share")
    axis.set_title(f"features: effective rank {spectrum['effective_rank']:.1f}")


def plot_comparison(rows: Sequence[dict], labels: Sequence[str], path: Path) -> Path:
    """Writes a group of bars for each accuracy, with a bar for each run; rows as in results.json."""
    figure, axis = _figure(1, 8.0)
    _bars(axis, rows, labels)
    axis.legend(fontsize=8)
    return _save(figure, path)


def _bars(axis: Any, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Of the numbers in percent that tables of these rows show."""
    width = 0.8 / len(rows)
    numbers = [n for n in columns_of(numbers_of(EVALUATIONS), rows) if n.unit == "%"]
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        shown = [(k, row[n.key]) for k, n in enumerate(numbers) if row.get(n.key) is not None]
        bars = axis.bar([k + i * width for k, _ in shown], [v for _, v in shown], width, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks([k + 0.4 - width / 2 for k in range(len(numbers))], [n.label for n in numbers])
    axis.set(ylabel="accuracy on clean test images, %", ylim=(0, 100))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path

"""Pictures of runs, drawn without a display."""

import json
from collections.abc import Sequence
from pathlib import Path

from poisonshield.engine.runfolder import RunFolder

READOUTS = {"test_top1": "classifier", "knn_top1": "k-NN", "linear_top1": "linear probe"}


def _figure(columns: int, width: float):  # noqa: ANN202
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, 3.4), constrained_layout=True)


def plot_run(folder: RunFolder) -> Path:
    """Writes results.png of one run: losses and shortcut diagnostics over steps, and accuracy by readout.

    Diagnostics: how alike the encoder finds an attacked and a plain view (VESPR logs it), or a clean and a poisoned image
    (evaluate.watch_pairs), and how much more the attacked view, or the clean image, costs the classifier.
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
    """Writes probes.png of one run from evaluation.json: the spectrum, and bars of what else was probed."""
    probes = json.loads((folder.path / "evaluation.json").read_text())["probes"]
    views, lipschitz, pairs = (probes[name] or {} for name in ("alignment", "lipschitz", "pairs"))
    panels = {
        "cosine": {
            "two views": views.get("positive_cosine"),
            "other samples": views.get("negative_cosine"),
            "clean, poisoned": pairs.get("psn_cln_sim"),
        },
        "local Lipschitz, unit features": {
            "found by ascent": lipschitz.get("unit"),
            "clean to poisoned": pairs.get("psn_local_lip_unit"),
        },
        "cross-entropy": {"clean": pairs.get("ce_clean"), "poisoned": pairs.get("ce_poisoned")},
    }
    panels = {title: {k: v for k, v in bars.items() if v is not None} for title, bars in panels.items()}
    panels = {title: bars for title, bars in panels.items() if bars}
    figure, axes = _figure(1 + len(panels), 4.2 * (1 + len(panels)))
    first, *others = axes if panels else [axes]
    first.plot(range(1, len(probes["spectrum"]["log10_shares"]) + 1), probes["spectrum"]["log10_shares"])
    first.set(xlabel="eigenvalue", ylabel="log10 of its share")
    first.set_title(f"features: effective rank {probes['spectrum']['effective_rank']:.1f}")
    for axis, (title, bars) in zip(others, panels.items(), strict=True):
        axis.bar_label(axis.bar(list(bars), list(bars.values())), fmt="%.3g", fontsize=8)
        axis.set_title(title)
    return _save(figure, folder.path / "probes.png")


def plot_comparison(rows: Sequence[dict], labels: Sequence[str], path: Path) -> Path:
    """Writes one bar group per readout with a bar per run; rows as in results.json."""
    figure, axis = _figure(1, 8.0)
    _bars(axis, rows, labels)
    axis.legend(fontsize=8)
    return _save(figure, path)


def _bars(axis, rows: Sequence[dict], labels: Sequence[str]) -> None:  # noqa: ANN001
    width = 0.8 / len(rows)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        shown = [(k, row[key]) for k, key in enumerate(READOUTS) if row[key] is not None]
        bars = axis.bar([k + i * width for k, _ in shown], [v for _, v in shown], width, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks([k + 0.4 - width / 2 for k in range(len(READOUTS))], list(READOUTS.values()))
    axis.set(ylabel="accuracy on clean test images, %", ylim=(0, 100))


def _save(figure, path: Path) -> Path:  # noqa: ANN001
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path

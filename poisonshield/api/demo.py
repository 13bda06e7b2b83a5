"""The whole story on one page: clean, poisoned, SSL+CE and VESPR, trained side by side on bundled images.

A 300,000-parameter network on 5,000 images, so that it takes minutes on a CPU; the numbers are this network's, and the
report says so.
"""

import io
import json
import logging
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from poisonshield import __version__
from poisonshield.api.stories import (
    Cost,
    Length,
    Shown,
    Story,
    as_data_uri,
    choose_length,
    claim_folder,
    run_stories,
    time_step,
)
from poisonshield.batch import Batch
from poisonshield.config import load_tree
from poisonshield.data import read_batch
from poisonshield.engine.processes import choose_device
from poisonshield.reports.plots import plot_comparison
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify, build_method
from poisonshield.runs.parts.image_data import build_poison, open_data

log = logging.getLogger(__name__)

CONFIG = resources.files("poisonshield.reports") / "templates" / "demo.yaml"
TEMPLATE = resources.files("poisonshield.reports") / "templates" / "report.html"

SIMCLR = ("method.name=simclr", "method.hidden=256", "method.out=128")
VESPR = ("defenses=[{name: vespr, eps: 8/255, attack: {steps: 1, step_size: 8/255}}]",)
NO_ATTACK = ("defenses=[{name: vespr, attack_views: []}]",)

# Of this network on two cores: its four trainings last as long as 1,710 timed steps of VESPR, the rest as 260.
COST = Cost(steps=632, training=1710, rest=260, seconds=120)

STORIES = (
    Story("supervised-clean", "supervised, clean data", ("data.poison=null",)),
    Story("supervised-poisoned", "supervised, poisoned data", ()),
    Story("ssl-ce-poisoned", "SSL + CE without attack, poisoned data", SIMCLR + NO_ATTACK),
    Story("vespr-poisoned", "VESPR, poisoned data", SIMCLR + VESPR),
)


def demo(out: Path, seed: int = 0) -> Shown:
    """Runs the four stories into folders under `out`; writes results.json, results.png and report.html there."""
    start = time.perf_counter()
    claim_folder(out, ("results.json", "results.png", "report.html"), STORIES)
    length = fit_to_machine()
    log.info(length.told)
    rows = run_stories(CONFIG, STORIES, out, [f"seed={seed}", *length.overrides])
    told = summary(rows) + length.warning
    minutes = (time.perf_counter() - start) / 60
    titles = [s.title for s in STORIES]
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    figure = plot_comparison(rows, titles, out / "results.png")
    report = write_report(out, rows, titles, told, seed=seed, minutes=minutes)
    columns = {"test_top1": "classifier", "knn_top1": "k-NN", "linear_top1": "linear probe"}
    cells = [[f"{row[k]:.1f}" for k in columns] + [f"{row['seconds']:.0f}"] for row in rows]
    title = "Accuracy on clean test images, % (small network, 5,000 training images)"
    return Shown(title, ["training", *columns.values(), "seconds"], titles, cells, told, minutes, report, figure)


def fit_to_machine() -> Length:
    """As many steps as this machine has time for, by some of the steps of VESPR's story on random pixels."""
    run = Classify(load_tree(str(CONFIG), [*SIMCLR, *VESPR]), Path(str(CONFIG)))
    device = choose_device(run.settings.engine.device)
    method = build_method(run, num_classes=10).to(device)
    draw, size = torch.Generator().manual_seed(0), run.settings.data.batch_size
    views = tuple(torch.rand(size, 3, 32, 32, generator=draw) for _ in range(method.num_views))
    batch = Batch(tuple(str(i) for i in range(size)), views=views, y=torch.arange(size) % 10)
    return choose_length(COST, time_step(method, batch.to(device)))


def summary(rows: list[dict]) -> str:
    """Two sentences with this run's own numbers: the damage, and the share of it that VESPR brings back."""
    clean, poisoned, _, vespr = (row["test_top1"] for row in rows)
    gap = clean - poisoned
    text = (
        f"The poison costs supervised training {gap:.1f} points of clean-test accuracy ({clean:.1f} to {poisoned:.1f})."
    )
    if gap > 0:
        back = 100 * (vespr - poisoned) / gap
        text += f" VESPR, on the same poisoned images, reaches {vespr:.1f}: {back:.0f} % of the loss is back."
    return text


def write_report(out: Path, rows: list[dict], titles: list[str], told: str, *, seed: int, minutes: float) -> Path:
    """One self-contained HTML file: what it tells, table, bars, example images with the perturbation magnified, and how
    to read them."""
    import jinja2

    run = read_experiment(str(CONFIG), [f"seed={seed}"])
    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True).render(
        rows=list(zip(titles, rows, strict=True)),
        summary=told,
        poison=run.record["data"]["poison"],
        bars=as_data_uri((out / "results.png").read_bytes()),
        examples=as_data_uri(_example_sheet(run)),
        magnification=_MAGNIFICATION,
        seed=seed,
        minutes=minutes,
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    path = out / "report.html"
    path.write_text(page)
    return path


_MAGNIFICATION = 12


def _example_sheet(run: Any) -> bytes:
    """PNG: the first image of each class, the same poisoned, and their difference magnified around grey."""
    from matplotlib import pyplot

    data = open_data(run)
    labels = data.train.labels
    batch = read_batch(data.train, torch.stack([(labels == k).nonzero()[0, 0] for k in range(data.num_classes)]))
    clean, poisoned = batch.x, build_poison(run, data.train).apply(batch).x
    assert clean is not None and poisoned is not None  # images were read, and a poison gives images for images
    pictures = {
        "clean": clean,
        "poisoned": poisoned,
        f"difference x {_MAGNIFICATION}": (0.5 + _MAGNIFICATION * (poisoned - clean)).clamp(0, 1),
    }
    figure, axes = pyplot.subplots(
        len(pictures), data.num_classes, figsize=(data.num_classes, 3.4), constrained_layout=True
    )
    for line, (name, x) in zip(axes, pictures.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axis, image, label in zip(line, x, data.train.classes, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([], [])
            axis.set_yticks([], [])
            if name == "clean":
                axis.set_title(label, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()

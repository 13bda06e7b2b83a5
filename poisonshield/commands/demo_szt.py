"""Safe-Zone Training on one page: a word learned from clean pictures, from poisoned ones, and from poisoned ones in the
safe zone, on the small pipeline that ships with the package.

The world is rendered and the pipeline has two million parameters, so that it takes minutes on a CPU; the report says so.
"""

import base64
import json
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from poisonshield import __version__
from poisonshield.commands.invert import invert
from poisonshield.reports.inversion_tables import draw_grid

CONFIG = resources.files("poisonshield.reports") / "templates" / "demo_szt.yaml"
TEMPLATE = resources.files("poisonshield.reports") / "templates" / "report_szt.html"

POISON = "data.poison={name: advdm, eps_levels: 16, steps: 100}"
FLOOR = "defenses=[{name: szt, purifier: null, mask: null, t_min: 500}]"
SZT = "defenses=[{name: szt, purifier: {name: jpeg, quality: 50}, mask: file, mask_dilate: 2, mask_floor: 0.3, t_min: 500}]"


@dataclass(frozen=True)
class Story:
    """One run of the demo: its folder, how the table calls it, and what it changes in demo_szt.yaml."""

    folder: str
    title: str
    overrides: tuple[str, ...]


STORIES = (
    Story("clean", "clean pictures", ()),
    Story("poisoned", "poisoned pictures", (POISON,)),
    Story("floor", "poisoned, high timesteps only", (POISON, FLOOR)),
    Story("szt", "poisoned, Safe-Zone Training", (POISON, SZT, "data.masks=file")),
)


def demo(out: Path, seed: int = 0) -> list[dict]:
    """Runs the stories into folders under `out`; writes results.json, pictures.png and report.html there."""
    from rich.console import Console
    from rich.table import Table

    console, start, rows = Console(), time.perf_counter(), []
    for i, story in enumerate(STORIES):
        console.print(f"[bold]{i + 1} of {len(STORIES)}: {story.title}")
        folder = invert(
            str(CONFIG),
            [
                f"seed={seed}",
                f"run.dir={json.dumps(str(out / story.folder))}",
                f"data.poison_cache={json.dumps(str(out / 'poisoned'))}",
                *story.overrides,
            ],
        )
        rows.append(json.loads((folder / "results.json").read_text())[0])
    minutes = (time.perf_counter() - start) / 60
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    sheet = draw_grid(out / "pictures.png", [({"training": s.title}, out / s.folder) for s in STORIES])
    table = Table(title="Pictures of the learned word (rendered world, 64 px)")
    for name in ("learned from", "fidelity", "concept shown, %", "seconds"):
        table.add_column(name, justify="left" if name == "learned from" else "right")
    for row, story in zip(rows, STORIES, strict=True):
        table.add_row(story.title, f"{row['fidelity']:.2f}", f"{row['shown']:.0f}", f"{row['seconds']:.0f}")
    console.print(table)
    console.print(summary(rows))
    write_report(out, rows, sheet, seed=seed, minutes=minutes)
    console.print(f"{minutes:.1f} minutes. Report: {out / 'report.html'}   Pictures: {sheet}")
    return rows


def summary(rows: list[dict]) -> str:
    """Two sentences with this run's own numbers."""
    clean, poisoned, floor, szt = (row["fidelity"] for row in rows)
    text = f"The poison takes the fidelity of the learned word from {clean:.2f} to {poisoned:.2f}."
    if clean - poisoned > 0.02:
        shares = [round(100 * (value - poisoned) / (clean - poisoned)) for value in (floor, szt)]
        text += (
            f" High timesteps alone bring back {shares[0]} % of what was lost, all of Safe-Zone Training {shares[1]} %."
        )
    return text


def write_report(out: Path, rows: list[dict], sheet: Path, *, seed: int, minutes: float) -> Path:
    """One self-contained HTML file: table, pictures, and how to read them."""
    import jinja2

    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True).render(
        rows=list(zip([s.title for s in STORIES], rows, strict=True)),
        summary=summary(rows),
        sheet="data:image/png;base64," + base64.b64encode(sheet.read_bytes()).decode(),
        seed=seed,
        minutes=minutes,
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    path = out / "report.html"
    path.write_text(page)
    return path

"""Safe-Zone Training on one page: a word learned from clean pictures, from poisoned ones, and from poisoned ones in the
safe zone, on the small pipeline that ships with the package.

The world is rendered and the pipeline has two million parameters, so that it takes minutes on a CPU; the report says
so.
"""

import json
import time
from importlib import resources
from pathlib import Path

import torch

from poisonshield import __version__
from poisonshield.api.stories import Shown, Story, as_data_uri, run_stories
from poisonshield.reports.inversion_tables import draw_grid

CONFIG = resources.files("poisonshield.reports") / "templates" / "demo_szt.yaml"
TEMPLATE = resources.files("poisonshield.reports") / "templates" / "report_szt.html"

POISON = "data.poison={name: advdm, eps_levels: 16, steps: 100}"
FLOOR = "defenses=[{name: szt, purifier: null, mask: null, t_min: 500}]"
PARTS = "purifier: {name: jpeg, quality: 50}, mask: file, mask_dilate: 2, mask_floor: 0.3, t_min: 500"
SZT = f"defenses=[{{name: szt, {PARTS}}}]"


STORIES = (
    Story("clean", "clean pictures", ()),
    Story("poisoned", "poisoned pictures", (POISON,)),
    Story("floor", "poisoned, high timesteps only", (POISON, FLOOR)),
    Story("szt", "poisoned, Safe-Zone Training", (POISON, SZT, "data.masks=file")),
)


def demo(out: Path, seed: int = 0) -> Shown:
    """Runs the stories into folders under `out`; writes results.json, pictures.png and report.html there."""
    start = time.perf_counter()
    cache = f"data.poison_cache={json.dumps(str(out / 'poisoned'))}"
    rows = run_stories(CONFIG, STORIES, out, [f"seed={seed}", cache])
    minutes = (time.perf_counter() - start) / 60
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    sheet = draw_grid(out / "pictures.png", [({"training": s.title}, out / s.folder) for s in STORIES])
    report = write_report(out, rows, sheet, seed=seed, minutes=minutes)
    cells = [[f"{row['fidelity']:.2f}", f"{row['shown']:.0f}", f"{row['seconds']:.0f}"] for row in rows]
    head = ["learned from", "fidelity", "concept shown, %", "seconds"]
    title = "Pictures of the learned word (rendered world, 64 px)"
    return Shown(title, head, [s.title for s in STORIES], cells, summary(rows), minutes, report, sheet)


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
        sheet=as_data_uri(sheet.read_bytes()),
        seed=seed,
        minutes=minutes,
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    path = out / "report.html"
    path.write_text(page)
    return path

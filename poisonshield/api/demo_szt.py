"""Safe-Zone Training on one page: a word learned from clean pictures, from poisoned ones, and from poisoned ones in the
safe zone, on the small pipeline that ships with the package.

The world is rendered and the pipeline has two million parameters, so that it takes minutes on a CPU; the report says
so.
"""

import json
import logging
import time
from importlib import resources
from pathlib import Path

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
from poisonshield.engine.processes import choose_device
from poisonshield.reports.inversion_tables import draw_grid
from poisonshield.runs.invert import Invert
from poisonshield.runs.parts.words import build_inversion, load_model

log = logging.getLogger(__name__)

CONFIG = resources.files("poisonshield.reports") / "templates" / "demo_szt.yaml"
TEMPLATE = resources.files("poisonshield.reports") / "templates" / "report_szt.html"

POISON = "data.poison={name: advdm, eps_levels: 16, steps: 100}"
FLOOR = "defenses=[{name: szt, purifier: null, mask: null, t_min: 500}]"
PARTS = "purifier: {name: jpeg, quality: 50}, mask: file, mask_dilate: 2, mask_floor: 0.3, t_min: 500"
SZT = f"defenses=[{{name: szt, {PARTS}}}]"

# Of this pipeline on two cores: its four trainings last as long as 1,430 timed steps, the rest as 540. It has the
# larger share of the five minutes: its order of defenses does not survive shortening, and that of VESPR's demo does.
COST = Cost(steps=300, training=1430, rest=540, seconds=170)
SHORT = (
    " Do not compare the defenses here: with 100 and with 150 of 300 steps Safe-Zone Training stood below high "
    "timesteps alone."
)

STORIES = (
    Story("clean", "clean pictures", ()),
    Story("poisoned", "poisoned pictures", (POISON,)),
    Story("floor", "poisoned, high timesteps only", (POISON, FLOOR)),
    Story("szt", "poisoned, Safe-Zone Training", (POISON, SZT, "data.masks=file")),
)


def demo(out: Path, seed: int = 0) -> Shown:
    """Runs the stories into folders under `out`; writes results.json, pictures.png and report.html there."""
    start = time.perf_counter()
    claim_folder(out, ("results.json", "pictures.png", "report.html", "poisoned"), STORIES)
    length = fit_to_machine()
    log.info(length.told)
    cache = f"data.poison_cache={json.dumps(str(out / 'poisoned'))}"
    rows = run_stories(CONFIG, STORIES, out, [f"seed={seed}", cache, *length.overrides])
    told = summary(rows) + (length.warning + SHORT if length.warning else "")
    minutes = (time.perf_counter() - start) / 60
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    sheet = draw_grid(out / "pictures.png", [({"training": s.title}, out / s.folder) for s in STORIES])
    report = write_report(out, rows, sheet, told, seed=seed, minutes=minutes)
    cells = [[f"{row['fidelity']:.2f}", f"{row['shown']:.0f}", f"{row['seconds']:.0f}"] for row in rows]
    head = ["learned from", "fidelity", "concept shown, %", "seconds"]
    title = "Pictures of the learned word (rendered world, 64 px)"
    return Shown(title, head, [s.title for s in STORIES], cells, told, minutes, report, sheet)


def fit_to_machine() -> Length:
    """As many steps as this machine has time for, by some of the steps of the clean story on random pixels."""
    run = Invert(load_tree(str(CONFIG)), Path(str(CONFIG)))
    device = choose_device(run.settings.engine.device)
    method, _ = build_inversion(run, load_model(run.settings.model), ["ring"])
    draw, size = torch.Generator().manual_seed(0), run.settings.data.batch_size
    batch = Batch(
        tuple(f"{i}#0" for i in range(size)),
        x=torch.rand(size, 3, 64, 64, generator=draw),
        y=torch.zeros(size, dtype=torch.long),
        captions=("a photo of a <ring>",) * size,
    )
    return choose_length(COST, time_step(method.to(device), batch.to(device)))


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


def write_report(out: Path, rows: list[dict], sheet: Path, told: str, *, seed: int, minutes: float) -> Path:
    """One self-contained HTML file: what it tells, table, pictures, and how to read them."""
    import jinja2

    page = jinja2.Template(TEMPLATE.read_text(), autoescape=True).render(
        rows=list(zip([s.title for s in STORIES], rows, strict=True)),
        summary=told,
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

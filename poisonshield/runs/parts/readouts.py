"""What a classifier's run writes of its numbers: a row of results, all that was measured, and figures."""

import json
import logging
from typing import Any

from poisonshield.engine.runfolder import RunFolder
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.parts.numbers import Measured, numbers_of, row_of, values_of
from poisonshield.files import write_whole
from poisonshield.reports.plots import plot_probes
from poisonshield.runs.parts.image_data import OpenData
from poisonshield.runs.parts.training import Training

log = logging.getLogger(__name__)


def write_results(
    run: Training, data: OpenData, folder: RunFolder, measured: Measured, *, steps: int, seconds: float
) -> None:
    """Adds the run's row to results.json, writes all that was measured with its settings to evaluation.json, and draws
    probes.png."""
    poison = run.poison_label
    if poison == "none" and data.train.manifest.poison:
        poison = data.train.manifest.poison.get("name", "unnamed")
    row = {
        "data": run.settings.data.train,
        "poison": poison,
        "method": run.method.name,
        "defense": run.defense_label,
        "seed": run.seed,
        **row_of(measured, EVALUATIONS),
        "steps": steps,
        "seconds": round(seconds, 1),
    }
    row["data"] = _find_earlier_name(run, folder, row)
    folder.add_result(row, identity=run.identity)
    record = {**measured, "settings": run.record["evaluate"]}
    write_whole(folder.path / "evaluation.json", json.dumps(record, indent=1))
    plot_probes(folder)
    known = values_of(measured, EVALUATIONS)
    percents = [n for n in numbers_of(EVALUATIONS) if n.unit == "%" and known[n.key] is not None]
    log.info("results: %s", "  ".join(f"{n.key} {n.write(known[n.key], more=1)}" for n in percents))


def _find_earlier_name(run: Training, folder: RunFolder, row: dict[str, Any]) -> str:
    """How the run's earlier row calls the data, which may lie elsewhere now; the row's own name if there is none."""
    rows = json.loads(folder.results.read_text()) if folder.results.is_file() else []
    same = [r for r in rows if all(r.get(key) == row[key] for key in run.identity if key != "data")]
    return same[-1]["data"] if same else row["data"]

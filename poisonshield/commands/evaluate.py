"""The numbers of a finished run of a classifier, by every evaluation of evals/.

What was learned by textual inversion is read in reading.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from poisonshield.build import OpenData, Run, TrainingSet, build_method, build_training_set, open_data, read_run
from poisonshield.commands.samples import subject_of
from poisonshield.engine.checkpoint import write_whole
from poisonshield.engine.processes import choose_device
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.parts.numbers import Measured, measure, numbers_of, row_of, values_of
from poisonshield.invert_config import is_invert
from poisonshield.method import Method
from poisonshield.reports.plots import plot_probes
from poisonshield.reports.tables import list_numbers

log = logging.getLogger(__name__)


def evaluate(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Measured | list[dict[str, Any]]:
    """The numbers of a finished run folder, a block for each evaluation, written to its results; of a textual inversion
    a row for each concept. Overrides may say how they are read.

    Raises CheckpointError if the run has not finished, ConfigError for an override of what was trained.
    """
    folder = RunFolder(path)
    if folder.config.is_file() and is_invert(folder.config):
        from poisonshield.commands.invert import evaluate_inversion

        return evaluate_inversion(folder, overrides)
    weights = folder.export / "method.safetensors"
    if not folder.config.is_file() or not weights.is_file():
        raise CheckpointError(
            f"{folder.path} is not a finished run: it lacks {folder.config.name} or export/{weights.name}.\n"
            "  Train it first, or go on with engine.resume=auto."
        )
    for text in overrides:
        if not text.startswith(("evaluate.", "data.batch_size", "data.source", "data.workers", "engine.device")):
            raise ConfigError(
                f"{text}: a finished run keeps what it was trained with. evaluate.*, data.source, data.workers, "
                "data.batch_size and engine.device may change."
            )
    run = read_run(folder.config, overrides)
    data = open_data(run)
    device = choose_device(run.settings.engine.device)
    method = fresh_method(run, data, load_file(weights), device)
    values = readouts(run, data, method, build_training_set(run, data), device)
    old = json.loads(folder.results.read_text())[-1] if folder.results.is_file() else {}
    write_results(run, data, folder, values, steps=old.get("steps", 0), seconds=old.get("seconds", 0.0))
    return values


def told(values: Measured | list[dict[str, Any]]) -> str:
    """What `evaluate` returned, for people: a number a line, or a table with a line for each concept."""
    if isinstance(values, list):
        from poisonshield.reports.inversion_tables import concept_table

        return concept_table(values)
    return list_numbers(values, EVALUATIONS)


def fresh_method(run: Run, data: OpenData, state: dict[str, torch.Tensor], device: torch.device) -> Method:
    """The run's method on one device with the given weights, whatever trained and sharded them."""
    method = build_method(run, data.num_classes, initialize=False)
    method.load_state_dict(state)
    return method.to(device).to(memory_format=torch.channels_last).eval()


def readouts(run: Run, data: OpenData, method: Method, training: TrainingSet, device: torch.device) -> Measured:
    """What each evaluation gives, {name: {key: value}}, None for one that the settings leave out."""
    return measure(subject_of(run, data, training, method, device), run.settings.evaluate, EVALUATIONS)


def write_results(
    run: Run, data: OpenData, folder: RunFolder, measured: Measured, *, steps: int, seconds: float
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
    folder.add_result(row)
    record = {**measured, "settings": run.record["evaluate"]}
    write_whole(folder.path / "evaluation.json", json.dumps(record, indent=1))
    plot_probes(folder)
    known = values_of(measured, EVALUATIONS)
    percents = [n for n in numbers_of(EVALUATIONS) if n.unit == "%" and known[n.key] is not None]
    log.info("results: %s", "  ".join(f"{n.key} {n.write(known[n.key], more=1)}" for n in percents))

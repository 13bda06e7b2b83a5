"""Accuracy of a finished run by every readout, always on clean test images, and the probes of probes.py.

What was learned by textual inversion is read in reading.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from poisonshield.build import OpenData, Run, TrainingSet, build_method, build_training_set, open_data, read_run
from poisonshield.commands.probes import probes, scalars
from poisonshield.commands.samples import LEGACY_ATTACKED, LEGACY_BANK, LEGACY_QUERIES, Samples
from poisonshield.engine.checkpoint import write_whole
from poisonshield.engine.processes import choose_device
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.evals.classifier import classifier
from poisonshield.evals.knn import knn
from poisonshield.evals.linear import linear
from poisonshield.evals.parts.features import extract
from poisonshield.evals.robust import robust
from poisonshield.invert_config import is_invert
from poisonshield.method import Method
from poisonshield.reports.plots import plot_probes

log = logging.getLogger(__name__)


def evaluate(folder: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> dict[str, Any] | list[dict[str, Any]]:
    """The readouts and probes of a finished run folder, written to its results; of a textual inversion a row for each
    concept. Overrides may say how they are read.

    Raises CheckpointError if the run has not finished, ConfigError for an override of what was trained.
    """
    folder = RunFolder(folder)
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
    old = json.loads(folder.results.read_text())[-1] if folder.results.is_file() else {"steps": 0, "seconds": 0.0}
    write_results(run, data, folder, values, steps=old["steps"], seconds=old["seconds"])
    return values


def told(values: dict[str, Any] | list[dict[str, Any]]) -> str:
    """What `evaluate` returned, for people: a number a line, or a table with a line for each concept."""
    if isinstance(values, list):
        from poisonshield.reports.inversion_tables import concept_table

        return concept_table(values)
    shown = lambda name, value: "-" if value is None else f"{value:.4g}" if "." in name else f"{value:.2f}"
    return "\n".join(f"{name:12s} {shown(name, value)}" for name, value in scalars(values).items())


def fresh_method(run: Run, data: OpenData, state: dict[str, torch.Tensor], device: torch.device) -> Method:
    """The run's method on one device with the given weights, whatever trained and sharded them."""
    method = build_method(run, data.num_classes, initialize=False)
    method.load_state_dict(state)
    return method.to(device, memory_format=torch.channels_last).eval()


def readouts(run: Run, data: OpenData, method: Method, training: TrainingSet, device: torch.device) -> dict[str, Any]:
    """test_top1 and train_top1 (classifier head), knn_top1, linear_top1, robust_top1, in percent, None where there is no
    classifier; and under `probes` what probes.py gives.

    k-NN and the linear probe see the training set as it was trained on (poisoned, purified), without augmentation.
    With evaluate.legacy, k-NN has a bank and queries of its own, and fewer images are attacked.
    """
    s, samples = run.settings.evaluate, Samples(run, data, training, method, device)
    train_features = extract(method.encoder, samples.train())
    test_features = extract(method.encoder, samples.test())
    bank, queries = train_features, test_features
    if s.legacy:
        bank = extract(method.encoder, samples.augmented(LEGACY_BANK, legacy_bank=True))
        queries = extract(method.encoder, samples.test(LEGACY_QUERIES))
    values = {
        "test_top1": classifier(method, samples.test()),
        "train_top1": classifier(method, samples.train()),
        "knn_top1": knn(
            bank,
            queries,
            k=s.knn_k,
            num_classes=data.num_classes,
            weighted=s.knn_weighted,
            temperature=s.knn_temperature,
        ),
        "linear_top1": linear(
            train_features, test_features, num_classes=data.num_classes, weight_decay=s.linear_weight_decay
        ),
        "robust_top1": None,
    }
    if s.robust_steps > 0:
        values["robust_top1"] = robust(
            method,
            samples.test(LEGACY_ATTACKED if s.legacy else s.robust_samples),
            eps=s.robust_eps,
            steps=s.robust_steps,
            step_size=s.robust_step_size,
            restarts=s.robust_restarts,
            loss="logit" if s.legacy else "ce",
            seed=run.seed,
        )
    return {**values, "probes": probes(samples, train_features, test_features, bank)}


def write_results(
    run: Run, data: OpenData, folder: RunFolder, values: dict[str, Any], *, steps: int, seconds: float
) -> None:
    """Adds the run's row to results.json, all readouts and probes with their settings to evaluation.json, and draws
    the probes into probes.png."""
    poison = run.poison_label
    if poison == "none" and data.train.manifest.poison:
        poison = data.train.manifest.poison.get("name", "unnamed")
    row = {
        "data": run.settings.data.train,
        "poison": poison,
        "method": run.method.name,
        "defense": run.defense_label,
        "seed": run.seed,
        **{k: None if values[k] is None else round(values[k], 2) for k in ("test_top1", "knn_top1", "linear_top1")},
        "steps": steps,
        "seconds": round(seconds, 1),
    }
    folder.add_result(row)
    write_whole(folder.path / "evaluation.json", json.dumps({**values, "settings": run.record["evaluate"]}, indent=1))
    plot_probes(folder)
    log.info("results: %s", "  ".join(f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float)))

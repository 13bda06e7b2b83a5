"""Accuracy of a finished run by every readout, always on clean test images."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from poisonshield.build import OpenData, Run, TrainingSet, build_method, build_training_set, open_data, read_run
from poisonshield.data import evaluate_batches
from poisonshield.engine.checkpoint import write_whole
from poisonshield.engine.processes import choose_device
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.evals.classifier import classifier
from poisonshield.evals.features import extract
from poisonshield.evals.knn import knn
from poisonshield.evals.linear import linear
from poisonshield.evals.robust import robust
from poisonshield.method import Method

log = logging.getLogger(__name__)


def evaluate(folder: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> dict[str, float | None]:
    """The readouts of a finished run folder, written to its results. Overrides may say how they are read.

    Raises CheckpointError if the run has not finished, ConfigError for an override of what was trained.
    """
    folder = RunFolder(folder)
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


def fresh_method(run: Run, data: OpenData, state: dict[str, torch.Tensor], device: torch.device) -> Method:
    """The run's method on one device with the given weights, whatever trained and sharded them."""
    method = build_method(run, data.num_classes)
    method.load_state_dict(state)
    return method.to(device, memory_format=torch.channels_last).eval()


def readouts(
    run: Run, data: OpenData, method: Method, training: TrainingSet, device: torch.device
) -> dict[str, float | None]:
    """test_top1 (classifier head), knn_top1, linear_top1, robust_top1, in percent; None where there is no classifier.

    k-NN and the linear probe see the training set as it was trained on (poisoned, purified), without augmentation.
    """
    s, size = run.settings.evaluate, run.settings.evaluate.batch_size

    def test_batches():  # noqa: ANN202
        return evaluate_batches(data.test, batch_size=size, device=device)

    train_features = extract(method.encoder, training.batches(size, device))
    test_features = extract(method.encoder, test_batches())
    values = {
        "test_top1": classifier(method, test_batches()),
        "knn_top1": knn(train_features, test_features, k=s.knn_k, num_classes=data.num_classes),
        "linear_top1": linear(
            train_features, test_features, num_classes=data.num_classes, weight_decay=s.linear_weight_decay
        ),
        "robust_top1": None,
    }
    if s.robust_steps > 0:
        values["robust_top1"] = robust(
            method,
            test_batches(),
            eps=s.robust_eps,
            steps=s.robust_steps,
            step_size=s.robust_step_size,
            max_samples=s.robust_samples,
            seed=run.seed,
        )
    return values


def write_results(
    run: Run, data: OpenData, folder: RunFolder, values: dict[str, Any], *, steps: int, seconds: float
) -> None:
    """Adds the run's row to results.json, and all readouts with their settings to evaluation.json."""
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
    log.info("results: %s", "  ".join(f"{k} {v:.2f}" for k, v in values.items() if v is not None))

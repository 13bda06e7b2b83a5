"""Runs built as `poisonshield train` builds them: what tests of ranks, resumption and learning share."""

import functools
import json
from pathlib import Path

from torch import nn

from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify, build_method, build_stream, spread_batch_norm
from poisonshield.runs.parts.image_data import build_training_set, open_data

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MINI = str(CONFIGS / "defend" / "vespr_cifar10_mini.yaml")
SSL_METHODS = tuple(n for n in Classify.methods.names() if not Classify.methods.get(n).has_classifier)


def choose_method(name, **wanted):
    """The override that picks a method, with those of the wanted settings that it has."""
    known = Classify.methods.get(name).Config.model_fields
    return f"method={json.dumps({'name': name} | {key: value for key, value in wanted.items() if key in known})}"


@functools.cache
def opened(config=MINI, *overrides):
    """The data of every run of a config, and its training set."""
    run = read_experiment(config, ["method.name=simclr", "run.dir=unused", *overrides])
    data = open_data(run)
    return data, build_training_set(run, data)


def smooth(module):
    """ReLU becomes SiLU, in place. At ReLU's kink one rounding error flips a whole gradient element, so that two equal
    computations with sums in another order drift apart within some steps, on one process as on two."""
    for child in module.modules():
        for name, part in child.named_children():
            if isinstance(part, nn.ReLU):
                setattr(child, name, nn.SiLU())
    return module


def fit(folder, overrides, *, config=MINI, data=None, change=lambda method: method):
    """The trainer of a finished run, as `poisonshield train` builds it but for `change` of the method.

    data: what `opened` gives, where it is not the config's own.
    """
    run = read_experiment(config, [*overrides, f"run.dir={folder}"])
    data, training = data or opened(config)
    with processes(run.settings.engine, seed=run.seed) as device:
        method = spread_batch_norm(run, change(build_method(run, data.num_classes)), device)
        trainer = Trainer(
            method,
            build_stream(run, training, method, device),
            run.settings.engine,
            optimizer=run.settings.optimizer,
            schedule=run.settings.schedule,
            run_folder=RunFolder(folder),
            seed=run.seed,
            fixed_record=run.record,
        )
        trainer.fit()
    return trainer


def logged(folder):
    """The loss of each logged step."""
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def apart(a, b):
    """The largest difference of two runs' losses."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))

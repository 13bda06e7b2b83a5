"""Train one experiment, export its weights and read off its accuracy. What `launch/train.py` calls on every rank."""

import json
import logging
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from poisonshield import collectives
from poisonshield.build import (
    Run,
    build_method,
    build_stream,
    build_training_set,
    open_data,
    read_run,
    spread_batch_norm,
)
from poisonshield.commands.evaluate import fresh_method, readouts, write_results
from poisonshield.commands.samples import subject_of
from poisonshield.engine.processes import processes, refuse_missing
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.evals.pairs import watch_pairs
from poisonshield.invert_config import is_invert, read_invert
from poisonshield.reports.plots import plot_run

log = logging.getLogger(__name__)


def train(config: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Path:
    """The run folder of a finished run, of a classifier's kind or of textual inversion. Config and data are checked
    before any process group starts.

    Raises ConfigError, DataError, CheckpointError; Preempted (exit code 75) if told to stop, after saving.
    """
    if is_invert(config, overrides):
        from poisonshield.commands.invert import invert

        return invert(config, overrides)
    run = read_run(config, overrides)
    engine = run.settings.engine
    folder = RunFolder(run.settings.run.dir, overwrite=run.settings.run.overwrite)
    folder.check(run.record, resume=engine.resume)
    refuse_missing(engine)
    data = open_data(run)
    training = build_training_set(run, data)
    method = build_method(run, data.num_classes, initialize=not folder.will_load(engine.resume))
    with processes(engine, seed=run.seed) as device:
        method = spread_batch_norm(run, method, device)
        log.info("%s: %s on %s, poison %s, defense %s", run.origin, run.method.name, run.settings.data.train,
                 run.poison_label, run.defense_label)  # fmt: skip
        trainer = Trainer(
            method,
            build_stream(run, training, method, device),
            engine,
            optimizer=run.settings.optimizer,
            schedule=run.settings.schedule,
            run_folder=folder,
            seed=run.seed,
            fixed_record=run.record,
            watch=watch_pairs(subject_of(run, data, training, method, device), run.settings.evaluate.watch_pairs),
        )
        done = trainer.fit()
        state = trainer.state_dict()
        if collectives.rank() == 0:
            export(run, state, folder)
            values = readouts(run, data, fresh_method(run, data, state, device), training, device)
            write_results(run, data, folder, values, steps=done["steps"], seconds=done["seconds"])
            plot_run(folder)
        collectives.barrier()
    return folder.path


def resolved(config: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> str:
    """The checked settings as YAML, defaults filled in; with engine.backend: deepspeed also the JSON derived from them."""
    run = (read_invert if is_invert(config, overrides) else read_run)(config, overrides)
    text = yaml.safe_dump(json.loads(json.dumps(run.record)), sort_keys=False)
    if run.settings.engine.backend == "deepspeed":
        from poisonshield.engine.backends.deepspeed import deepspeed_config

        text += "\n# DeepSpeed gets:\n"
        text += json.dumps(deepspeed_config(run.settings.engine, run.settings.optimizer), indent=2)
    return text.rstrip()


def export(run: Run, state: dict[str, torch.Tensor], folder: RunFolder) -> None:
    """Writes `export/method.safetensors` (everything) and `export/backbone.safetensors` (timm's own names, loads strictly)."""
    folder.export.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in state.items()}
    metadata = {"format": "pt", "model": json.dumps(run.record["model"])}
    save_file(state, folder.export / "method.safetensors", metadata=metadata)
    marker = "encoder.backbone."
    backbone = {k[k.index(marker) + len(marker) :]: v.clone() for k, v in state.items() if marker in k}
    save_file(backbone, folder.export / "backbone.safetensors", metadata=metadata)

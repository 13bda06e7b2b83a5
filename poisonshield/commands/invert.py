"""Textual inversion of one config: poison if asked, learn the words, write embeddings, pictures and numbers.

What `poisonshield train` does with a config of this kind, on one process or on the ranks of a launcher.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.build_diffusion import (
    build_inversion,
    build_trainer,
    for_training,
    load_model,
    open_concepts,
)
from poisonshield.commands.forge_concepts import poisoned
from poisonshield.commands.reading import mask_values, measure, pixels_of, references
from poisonshield.data.concepts import Concept
from poisonshield.defenses.base import Defense
from poisonshield.engine.checkpoint import together, write_whole
from poisonshield.engine.processes import choose_device, processes, refuse_missing
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.errors import CheckpointError, ConfigError
from poisonshield.invert_config import InvertRun, read_invert
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.embeddings import Learned, load_embedding, save_embedding
from poisonshield.models.diffusion.sampler import latent_shape, sample, start_noise
from poisonshield.reports.sheets import draw_sheet, write_pictures

log = logging.getLogger(__name__)


def invert(config: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Path:
    """The run folder of a finished inversion. Everything is checked before any process group starts.

    Raises ConfigError, DataError, CheckpointError; Preempted (exit code 75) if told to stop, after saving.
    """
    run = read_invert(config, overrides)
    engine = run.settings.engine
    folder = RunFolder(run.settings.run.dir, overwrite=run.settings.run.overwrite)
    folder.check(run.record, resume=engine.resume)
    refuse_missing(engine)
    model = load_model(run.settings.model)
    clean = open_concepts(run, model)
    if run.settings.generate.clean is not None:
        for concept in clean:
            references(run, concept, alone=len(clean) == 1)  # what it lacks is told before training, not after
    with processes(engine, seed=run.seed) as device:
        model.to(device)
        method, defenses = build_inversion(run, model, [c.name for c in clean])
        concepts = for_training(run, poisoned(run, model, clean, folder.path))
        log.info("%s: %s of %d concepts on %s, poison %s, defense %s", run.origin, run.method.name, len(concepts),
                 run.settings.model.pipeline, run.poison_label, run.defense_label)  # fmt: skip
        validation = Validation(run, method, folder, defenses)
        trainer = validation.trainer = build_trainer(run, method, defenses, concepts, folder, watch=validation)
        done = trainer.fit()
        state = trainer.state_dict()

        def end() -> None:
            method.vectors = nn.Parameter(state["vectors"].to(device))  # whole again, where ranks had pieces of them
            finish(run, folder, method.to(device), defenses, clean=clean, trained_on=concepts, done=done)

        together(end, what="drawing and measuring", only_first=True, patient=True)
    return folder.path


def evaluate_inversion(folder: RunFolder, overrides: tuple[str, ...] | list[str] = ()) -> list[dict[str, Any]]:
    """New pictures and numbers of a finished run, which replace the old ones; `generate.*` and `evaluate.*` may say how.

    Raises CheckpointError if the run has not finished, ConfigError for an override of what was trained.
    """
    if not folder.config.is_file() or not folder.results.is_file():
        raise CheckpointError(f"{folder.path} is not a finished run. Train it first, or go on with engine.resume=auto.")
    for text in overrides:
        if not text.startswith(("generate.", "evaluate.", "engine.device")):
            raise ConfigError(
                f"{text}: a finished run keeps what it was trained with. generate.*, evaluate.* and engine.device may "
                "change."
            )
    run, old = read_invert(folder.config, overrides), json.loads(folder.results.read_text())
    model = load_model(run.settings.model).to(choose_device(run.settings.engine.device))
    clean = open_concepts(run, model)
    concepts = for_training(run, poisoned(run, model, clean, folder.path))
    method, defenses = build_inversion(run, model, [c.name for c in concepts])
    with torch.no_grad():
        for name, placeholder in method.placeholders.items():
            method.rows(name).copy_(
                load_embedding(embedding_file(folder, placeholder.token), placeholder.token).vectors
            )
    method.to(model.alphas_cumprod.device)
    finish(
        run, folder, method, defenses, clean=clean, trained_on=concepts, trained={row["concept"]: row for row in old}
    )
    return json.loads(folder.results.read_text())


class Validation:
    """Pictures of every concept while it is learned, into `validation/`: at the first logged step of each
    `generate.every_steps` steps."""

    def __init__(self, run: InvertRun, method: TextualInversion, folder: RunFolder, defenses: list[Defense]) -> None:
        self.run, self.method, self.folder, self.defenses = run, method, folder, defenses
        self.trainer: Trainer | None = None

    def __call__(self) -> Mapping[str, float]:
        """Asked at the end of each logged interval; draws if a multiple of every_steps lies in it."""
        every, step = self.run.settings.generate.every_steps, self.trainer.step
        logged = self.run.settings.engine.log_every_steps
        # Counted from the steps alone, so that a run which was stopped draws what it would have drawn.
        if every is None or step // every == (step - 1) // logged * logged // every:
            return {}
        rows = self.trainer.state_dict().get("vectors")  # every rank has to ask, as each may hold a piece
        if collectives.rank() == 0:
            rows = rows.to(self.trainer.device)
            t_min = floor_of(self.defenses)
            drawn = lambda name: generate(self.run, self.method, name, count=4, t_min=t_min, rows=rows)["recon"]
            pictures = {name: drawn(name) for name in self.method.placeholders}
            draw_sheet(self.folder.validation / f"step-{step:06d}.png", pictures)
        return {}


@torch.no_grad()
def generate(
    run: InvertRun,
    method: TextualInversion,
    name: str,
    *,
    count: int | None = None,
    t_min: int = 0,
    size: int | None = None,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """Pictures of a concept by prompt group, each [count, 3, H, W] in [0, 1]. The noise depends on `generate.seed` only.

    size: pixels a side, by default as the pipeline was built for. rows: other vectors than the method's, all concepts'.
    """
    g, model = run.settings.generate, method.model
    count, token = count or g.count, method.placeholders[name].token
    rows, out = method.vectors.detach() if rows is None else rows, {}
    for group, templates in (("recon", g.recon), ("compose", g.compose)):
        if not templates:
            continue
        texts = [templates[i % len(templates)] for i in range(count)]
        keys = [f"{group}/{i}" for i in range(count)]
        switch = None
        if g.switch and t_min > 0:
            word = run.method.config.init if isinstance(run.method.config.init, str) else run.method.config.init[name]
            switch = (t_min, model.prompts([t.format(word) for t in texts]))
        out[group] = sample(
            model,
            model.prompts([t.format(token) for t in texts], rows),
            noise=start_noise(keys, latent_shape(model, size), seed=g.seed, device=rows.device),
            steps=g.steps,
            guidance=g.guidance,
            switch=switch,
        )
    return out


def finish(
    run: InvertRun,
    folder: RunFolder,
    method: TextualInversion,
    defenses: list[Defense],
    *,
    clean: tuple[Concept, ...],
    trained_on: tuple[Concept, ...],
    done: Mapping[str, Any] | None = None,
    trained: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Embedding files, pictures, one sheet, a row of results for each concept, and by which settings they came about.

    done: what the trainer returned; or, for a run that was trained before, trained: the old row of each concept.
    """
    embeddings(method, folder)
    if trained is None:
        t_min, steps, seconds = floor_of(defenses), done["steps"], round(done["seconds"], 1)
        compared = run.settings.data.mask_reference is not None
        trained = {
            c.name: {
                "t_min": t_min,
                **mask_values(defenses, c.name, compared=compared),
                "steps": steps,
                "seconds": seconds,
            }
            for c in clean
        }
    pictures = {name: generate(run, method, name, t_min=trained[name]["t_min"]) for name in method.placeholders}
    write_pictures(folder.path / "pictures", pictures)
    draw_sheet(
        folder.path / "pictures.png",
        {
            **{f"{c.name}, trained on": pixels_of(c) for c in trained_on},
            **{f"{name}, {group}": x for name, groups in pictures.items() for group, x in groups.items()},
        },
    )
    rows = []
    for concept in clean:
        values = measure(run, method, concept, pictures[concept.name])
        rows.append(
            {
                "concept": concept.name,
                "group": concept.group,
                "poison": run.poison_label,
                "defense": run.defense_label,
                "method": run.method.name,
                "seed": run.seed,
                "left_out": run.settings.data.left_out,
                **values,
                **{k: trained[concept.name].get(k) for k in ("t_min", "mask_area", "mask_iou", "steps", "seconds")},
            }
        )
    write_whole(folder.results, json.dumps(rows, indent=1))
    settings = {**run.record["generate"], "evaluate": run.record["evaluate"]}
    write_whole(folder.path / "evaluation.json", json.dumps({"settings": settings}, indent=1))
    log.info("results   %s", folder.results)


def floor_of(defenses: list[Defense]) -> int:
    """The first timestep that was trained on."""
    ranges = [getattr(d, "t_range", None) for d in defenses]
    return next((r[0] for r in ranges if r), 0)


def embeddings(method: TextualInversion, folder: RunFolder) -> list[Path]:
    """One file per concept, `export/<name>/learned_embeds.safetensors`, as diffusers' load_textual_inversion reads it."""
    paths = []
    for name, placeholder in method.placeholders.items():
        paths.append(embedding_file(folder, placeholder.token))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_embedding(Learned(placeholder.token, method.rows(name).detach().float().cpu()), paths[-1])
    return paths


def embedding_file(folder: RunFolder, token: str) -> Path:
    """Where a run keeps the word that prompts call by this placeholder."""
    return folder.export / token.strip("<>") / "learned_embeds.safetensors"

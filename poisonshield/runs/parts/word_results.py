"""What comes out of a textual inversion: embedding files, pictures, a sheet, and a row of numbers for each concept."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.data.concepts import Concept
from poisonshield.defenses.base import Defense
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.files import write_whole
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.sampler import latent_shape, sample, start_noise
from poisonshield.reports.sheets import draw_sheet, write_pictures
from poisonshield.runs.parts.reading import average_mask_numbers, measure, stack_pixels
from poisonshield.runs.parts.training import Training

log = logging.getLogger(__name__)

_OF_TRAINING = ("t_min", "mask_area", "mask_iou", "steps", "seconds")  # what a row keeps when it is measured anew


class Validation:
    """Pictures of every concept while it is learned, into `validation/`.

    They are drawn at the first logged step of each `generate.every_steps` steps.
    """

    trainer: Trainer
    """Set before training starts: a trainer is built with what it is to watch, so it comes after this object."""

    def __init__(self, run: Training, method: DiffusionMethod, folder: RunFolder, defenses: list[Defense]) -> None:
        self.run, self.method, self.folder, self.defenses = run, method, folder, defenses

    def __call__(self) -> Mapping[str, float]:
        """Asked at the end of each logged interval; draws if a multiple of every_steps lies in it."""
        every, step = self.run.settings.generate.every_steps, self.trainer.step
        logged = self.run.settings.engine.log_every_steps
        # Counted from the steps alone, so that a run which was stopped draws what it would have drawn.
        if every is None or step // every == (step - 1) // logged * logged // every:
            return {}
        state = self.trainer.state_dict()  # every rank has to ask, as each may hold a piece
        if collectives.rank() == 0:
            self._draw(step, state["vectors"].to(self.trainer.device))
        return {}

    def _draw(self, step: int, rows: Tensor) -> None:
        """One sheet with four pictures of each word, from all concepts' vectors as they are now."""
        t_min, pictures = find_t_min(self.defenses), {}
        for name in self.method.placeholders:
            pictures[name] = generate(self.run, self.method, name, count=4, t_min=t_min, rows=rows)["recon"]
        draw_sheet(self.folder.path / "validation" / f"step-{step:06d}.png", pictures)


@torch.no_grad()
def generate(
    run: Training,
    method: DiffusionMethod,
    name: str,
    *,
    count: int | None = None,
    t_min: int = 0,
    size: int | None = None,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """Pictures of a concept by prompt group, each [count, 3, H, W] in [0, 1], from noise of `generate.seed` alone.

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
            word = method.start_word(method.config, name)
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
    run: Training,
    folder: RunFolder,
    method: DiffusionMethod,
    *,
    clean: tuple[Concept, ...],
    trained_on: tuple[Concept, ...],
    training: Mapping[str, Mapping[str, Any]],
) -> None:
    """Embedding files, pictures, one sheet, a row of results for each concept, and by which settings they came about.

    training: by concept, how it was trained: what describe_training gave, or the row of an earlier time.
    """
    files = write_embeddings(method, folder)
    pictures = {name: generate(run, method, name, t_min=training[name]["t_min"]) for name in method.placeholders}
    write_pictures(folder.path / "pictures", pictures)
    sheet = {f"{c.name}, trained on": stack_pixels(c) for c in trained_on}
    sheet |= {f"{name}, {group}": x for name, groups in pictures.items() for group, x in groups.items()}
    draw_sheet(folder.path / "pictures.png", sheet)
    rows = [
        {
            "concept": concept.name,
            "group": concept.group,
            "poison": run.poison_label,
            "defense": run.defense_label,
            "method": run.method.name,
            "seed": run.seed,
            "left_out": run.settings.data.left_out,
            **measure(run, method, concept, pictures[concept.name]),
            **{key: training[concept.name].get(key) for key in _OF_TRAINING},
        }
        for concept in clean
    ]
    write_whole(folder.results, json.dumps(rows, indent=1))
    settings = {**run.record["generate"], "evaluate": run.record["evaluate"]}
    write_whole(folder.path / "evaluation.json", json.dumps({"settings": settings}, indent=1))
    log.info("results   %s", folder.results)
    for (name, placeholder), file in zip(method.placeholders.items(), files, strict=True):
        log.info("word      %s, learned from %s: %s", placeholder.token, name, file)
        pipeline = run.settings.model.pipeline
        log.info("next      poisonshield generate --model %s --embedding %s -o pictures", pipeline, file)


def describe_training(
    run: Training, defenses: list[Defense], concepts: tuple[Concept, ...], *, steps: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """By concept, what its row of results says of how it was trained: first timestep, masks, length."""
    both = {"t_min": find_t_min(defenses), "steps": steps, "seconds": round(seconds, 1)}
    compared = run.settings.data.mask_reference is not None
    return {c.name: {**both, **average_mask_numbers(defenses, c.name, compared=compared)} for c in concepts}


def find_t_min(defenses: list[Defense]) -> int:
    """The first timestep that was trained on."""
    ranges = [d.t_range for d in defenses]
    return next((r[0] for r in ranges if r), 0)


def write_embeddings(method: DiffusionMethod, folder: RunFolder) -> list[Path]:
    """Write a file for each concept, `export/<name>/learned_embeds.safetensors`, as diffusers reads it."""
    paths = []
    for name, placeholder in method.placeholders.items():
        paths.append(embedding_file(folder, placeholder.token))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        save_embedding(Learned(placeholder.token, method.rows(name).detach().float().cpu()), paths[-1])
    return paths


def embedding_file(folder: RunFolder, token: str) -> Path:
    """Where a run keeps the word that prompts call by this placeholder."""
    return folder.export / token.strip("<>") / "learned_embeds.safetensors"

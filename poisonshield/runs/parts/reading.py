"""The numbers of one learned word: what its pictures show beside clean pictures of the concept.

For the rendered world the judge that lies beside the pipeline says whether the concept is there; without it that number
is missing, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from poisonshield import world
from poisonshield.data.concepts import Concept
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.defenses.base import Defense
from poisonshield.errors import DataError
from poisonshield.evals.diffusion import EVALUATIONS
from poisonshield.evals.diffusion.base import LearnedWord
from poisonshield.evals.parts.numbers import measure as evaluate
from poisonshield.keys import Key
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.pipeline import TINY
from poisonshield.runs.parts.training import Training
from poisonshield.runs.parts.word_settings import RENDERED
from poisonshield.world.judge import ConceptJudge

JUDGE = "judge.safetensors"
_REFERENCE_SEED = 2  # of renders that neither a pipeline nor a word was trained on


def measure(run: Training, method: DiffusionMethod, clean: Concept, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """A row's numbers by every evaluation that the run asks for, to four digits, and their details."""
    measured = evaluate(build_word(run, method, clean, pictures), run.settings.evaluate, EVALUATIONS)
    given = {key: value for block in measured.values() if block is not None for key, value in block.items()}
    return {key: float(f"{value:.4g}") if isinstance(value, (int, float)) else value for key, value in given.items()}


def build_word(run: Training, method: DiffusionMethod, clean: Concept, pictures: dict[str, Tensor]) -> LearnedWord:
    """What evaluations of a concept's word look at. pictures: generated ones by prompt group, [N, 3, H, W]."""
    judge = load_judge(run.settings.model.pipeline) if run.settings.data.train == RENDERED else None
    return LearnedWord(
        model=method.model,
        pictures={group: x.cpu() for group, x in pictures.items()},
        references=read_references(run, clean, alone=len(method.placeholders) == 1),
        clean=stack_pixels(clean),
        rows=method.rows(clean.name),
        judge=None if judge is None else JudgeOfConcept(judge, clean.name),
        prompts=_class_prompts(run, method, clean.name, len(pictures["recon"])),
    )


@dataclass(frozen=True)
class JudgeOfConcept:
    """A judge of the rendered world who is asked about one concept, such as yellow_ring."""

    judge: ConceptJudge
    concept: str

    def features(self, x: Tensor) -> Tensor:
        """Features [N, D] of pictures [N, 3, H, W]."""
        return self.judge.features(x)

    def fidelity(self, x: Tensor) -> dict[str, float]:
        """How far pictures [N, 3, H, W] show the concept: see ConceptJudge.fidelity."""
        color, _, shape = self.concept.partition("_")
        return self.judge.fidelity(x, color, shape)


def average_mask_numbers(defenses: Sequence[Defense], name: str, *, compared: bool) -> dict[str, float | None]:
    """mask_area and mask_iou of a concept: means over its pictures of what szt noted; None where it has no such mask.

    compared: whether the data gave masks to compare with, so that the overlap says something.
    """
    out: dict[str, float | None] = {"mask_area": None, "mask_iou": None}
    for defense in defenses:
        for key, values in defense.picture_numbers().items():
            found = [v for k, v in values.items() if Key.parse(k).concept == name]
            if found and (compared or key != "mask_iou"):
                out[key] = round(mean(found), 4)
    return out


def _class_prompts(run: Training, method: DiffusionMethod, name: str, count: int) -> tuple[str, ...] | None:
    """What the pictures' prompts say with the word that learning started from; None where it started from numbers."""
    recon, word = run.settings.generate.recon, method.start_word(method.config, name)
    if word is None:
        return None
    return tuple(recon[i % len(recon)].replace("{}", word) for i in range(count))


def load_judge(pipeline: str) -> ConceptJudge | None:
    """The judge beside a pipeline's parts, or None."""
    path = (TINY if pipeline == "tiny" else Path(pipeline)) / JUDGE
    return ConceptJudge.load(path) if path.is_file() else None


def read_references(run: Training, concept: Concept, *, alone: bool = True) -> Tensor:
    """Clean pictures [N, 3, H, W] to compare with: fresh ones of a rendered concept, else those of generate.clean or,
    without it, the concept's own; with data.left_out the one that was not learned from.

    alone: whether it is the run's only concept, so that a single one in generate.clean is meant whatever its name.
    Raises DataError if generate.clean does not have the concept, or the picture.
    """
    if run.settings.data.train == RENDERED:
        color, _, shape = concept.name.partition("_")
        count, only = run.settings.generate.references, [(color, shape)]
        return torch.stack([world.render(i, seed=_REFERENCE_SEED, only=only).x for i in range(count)])
    left, where = run.settings.data.left_out, run.settings.generate.clean
    stem = None if left is None else concept.leave_out(left)[1].stem
    if where is not None:
        size = concept.images[0].pixels.shape[-1]
        found = {c.name: c for c in load_concepts(where, size=size, crop=run.settings.data.crop)}
        name = next(iter(found)) if alone and len(found) == 1 else concept.name
        if name not in found:
            raise DataError(f"generate.clean {where} has no concept {name}. It has: {', '.join(found)}.")
        concept = found[name]
    images = [image for image in concept.images if stem in (None, image.stem)]
    if not images:
        raise DataError(
            f"generate.clean {where} has no picture {stem} of {concept.name}, which is left out of learning."
        )
    return torch.stack([image.pixels for image in images]).float() / 255


def stack_pixels(concept: Concept) -> Tensor:
    """All its pictures [N, 3, H, W] in [0, 1]."""
    return torch.stack([image.pixels for image in concept.images]).float() / 255

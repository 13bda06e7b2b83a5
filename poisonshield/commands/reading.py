"""The numbers of one learned word: what its pictures show beside clean pictures of the concept.

For the rendered world the judge that lies beside the pipeline says whether the concept is there; without it that number
is missing, never guessed.
"""

import logging
from collections.abc import Sequence
from functools import cache
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
from poisonshield.evals.diffusion.generation import latent_cosine, network_scores, round_trip_error, set_distances
from poisonshield.evals.diffusion.learned_words import word_report
from poisonshield.evals.diffusion.parts.image_quality import brisque, high_frequency
from poisonshield.invert_config import RENDERED, InvertRun, start_word
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.pipeline import TINY
from poisonshield.world.judge import ConceptJudge

log = logging.getLogger(__name__)

JUDGE = "judge.safetensors"
_REFERENCE_SEED = 2  # of renders that neither a pipeline nor a word was trained on


def measure(run: InvertRun, method: TextualInversion, clean: Concept, pictures: dict[str, Tensor]) -> dict[str, Any]:
    """A row's numbers, of the `recon` pictures [N, 3, H, W]; None where a number does not apply.

    fidelity, shown: the judge's mean probability and the percentage of pictures above one half. feature_distance,
    color_distance: to real pictures, each beside its ceiling (real pictures through the VAE). latent_cosine: to real
    pictures. high_frequency: share of energy. brisque: None without its package, which the log says. round_trip_error:
    of the concept's clean pictures through the VAE, what no word can draw. networks: scores of feature networks, or what
    they lack. word: where the vectors lie.
    """
    x, model, settings = pictures["recon"].cpu(), method.model, run.settings.generate
    judge = judge_of(run.settings.model.pipeline) if run.settings.data.train == RENDERED else None
    values: dict[str, Any] = {"fidelity": None, "shown": None}
    if judge is not None:
        color, _, shape = clean.name.partition("_")
        seen = judge.fidelity(x, color, shape)
        values = {"fidelity": seen["joint"], "shown": 100 * seen["share"]}
    real = references(run, clean, alone=len(method.placeholders) == 1)
    if len(real) >= 4 and len(x) >= 2:
        values |= set_distances(x, real, judge=judge, model=model)
    if real.shape[1:] == x.shape[1:]:
        values["latent_cosine"] = latent_cosine(model, x, real)
    values["high_frequency"] = float(high_frequency(x).mean())
    quality = brisque(x)
    if quality["status"] != "ok":
        _missing("BRISQUE", quality["needs"])
    values["brisque"] = quality.get("value")
    values["round_trip_error"] = float(round_trip_error(model, pixels_of(clean)).mean())
    values = {k: None if v is None else float(f"{v:.4g}") for k, v in values.items()}
    if settings.features:
        values["networks"] = network_scores(settings.features, x, real, _class_prompts(run, clean.name, len(x)))
    return values | {"word": word_report(method.rows(clean.name), model)}


def mask_values(defenses: Sequence[Defense], name: str, *, compared: bool) -> dict[str, float | None]:
    """mask_area and mask_iou of a concept: means over its pictures of what szt noted; None where it has no such mask.

    compared: whether the data gave masks to compare with, so that the overlap says something.
    """
    noted = {"mask_area": "areas", "mask_iou": "ious"} if compared else {"mask_area": "areas"}
    out: dict[str, float | None] = {"mask_area": None, "mask_iou": None}
    for defense in defenses:
        for key, attribute in noted.items():
            found = [v for k, v in getattr(defense, attribute, {}).items() if k.partition("/")[0] == name]
            if found:
                out[key] = round(mean(found), 4)
    return out


@cache
def _missing(what: str, needs: str) -> None:
    """Says it once a process."""
    log.warning("%s is not measured: %s", what, needs)


def _class_prompts(run: InvertRun, name: str, count: int) -> list[str] | None:
    """What the pictures' prompts say with the word that learning started from; None where it started from numbers."""
    init, recon = run.method.config.init, run.settings.generate.recon
    word = start_word(init if isinstance(init, str) else init[name])
    if word is None:
        return None
    return [recon[i % len(recon)].replace("{}", word) for i in range(count)]


def judge_of(pipeline: str) -> ConceptJudge | None:
    """The judge beside a pipeline's parts, or None."""
    path = (TINY if pipeline == "tiny" else Path(pipeline)) / JUDGE
    return ConceptJudge.load(path) if path.is_file() else None


def references(run: InvertRun, concept: Concept, *, alone: bool = True) -> Tensor:
    """Clean pictures [N, 3, H, W] to compare with: fresh ones of a rendered concept, else those of generate.clean or,
    without it, the concept's own; with data.left_out the one that was not learned from.

    alone: whether it is the run's only concept, so that a single one in generate.clean is meant whatever its name.
    Raises DataError if generate.clean does not have the concept, or the picture.
    """
    if run.settings.data.train == RENDERED:
        kind = tuple(concept.name.split("_"))
        made = [world.render(i, seed=_REFERENCE_SEED, only=[kind]).x for i in range(run.settings.generate.references)]
        return torch.stack(made)
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


def pixels_of(concept: Concept) -> Tensor:
    """All its pictures [N, 3, H, W] in [0, 1]."""
    return torch.stack([image.pixels for image in concept.images]).float() / 255

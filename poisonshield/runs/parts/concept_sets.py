"""Poisoned concepts on disk: what a poison of concepts releases, and what runs keep of it.

A set appears whole, under its name, or not at all; of several writers one wins, and all of them wrote the same.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.engine.checkpoint import together, write_whole
from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.poisons.diffusion.attack.manifest import manifest
from poisonshield.runs.parts.training import Training
from poisonshield.runs.parts.words import load_model, open_concepts

log = logging.getLogger(__name__)

_PIXELS_TOGETHER = 2**18  # of pictures that a poison changes at once


def release(run: Training) -> Path:
    """Writes the run's poisoned concepts to `<run.dir>/concepts`, lossless, with a manifest; a stopped one goes on.

    Raises ConfigError if the config names no poison or the folder holds a set already.
    """
    if run.poison is None:
        raise ConfigError(
            f"{run.origin} names no poison to write. Set data.poison, for example data.poison.name=advdm."
        )
    out, overwrite = Path(run.settings.run.dir) / "concepts", run.settings.run.overwrite
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} holds a set already. Choose another run.dir, or set run.overwrite=true.")
    model = load_model(run.settings.model)
    clean = open_concepts(run.settings.data, model)
    state = out.with_name("concepts.unfinished")
    summary = poison_concepts(run, model, clean, out, state=state, overwrite=overwrite)
    log.info("written   %s; learn from it with data.train=%s data.poison=null", out, out)
    log.info("measured  %s", [record["measured"] for record in summary["pictures"]])
    return out


def poisoned(run: Training, model: LatentDiffusion, clean: tuple[Concept, ...], folder: Path) -> tuple[Concept, ...]:
    """The concepts as the run's poison leaves them: read from the cache, or made by rank 0 and put there.

    What is half done when a run is stopped is kept in its folder, and its next start goes on from there.
    """
    if run.poison is None:
        return clean
    name = fingerprint(run, model, clean)
    cache = Path(run.settings.data.poison_cache or folder / "poisoned") / name

    def make() -> None:
        if not cache.is_dir():
            poison_concepts(run, model, clean, cache, state=folder / "poisoned.unfinished" / name)

    together(make, what="poisoning the concepts", only_first=True, patient=True)
    masks = None if clean[0].images[0].mask is None else "file"
    found = load_concepts(cache, size=clean[0].images[0].pixels.shape[-1], masks=masks)
    by_name = {concept.name: concept for concept in found}
    return tuple(by_name[concept.name] for concept in clean)


def poison_concepts(
    run: Training,
    model: LatentDiffusion,
    clean: tuple[Concept, ...],
    out: Path,
    *,
    state: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Perturbs all pictures of a set (of a concept, where the poison has a surrogate) together, writes them as a concept
    folder with its manifest, and returns the manifest.

    Masks are written along; the poison sees them only with data.poison_masks. state: where an unfinished one is kept.
    overwrite: a set that is there already gives way once the new one is whole; without it that one stays.
    """
    seed = run.seed if run.settings.data.poison_seed is None else run.settings.data.poison_seed
    poison = run.poison.cls(run.poison.config, model=model, seed=seed)
    pixels = {image.key: image.pixels for concept in clean for image in concept.images}
    log.info("poison    %s on %d pictures", run.poison.name, len(pixels))
    together = max(1, _PIXELS_TOGETHER // next(iter(pixels.values()))[0].numel())
    changed: dict[str, Tensor] = {}
    # A surrogate learns one subject: where pictures meet in one, those of other concepts stay out.
    for number, part in enumerate([[c] for c in clean] if poison.coupled else [list(clean)]):
        images = [image for concept in part for image in concept.images]
        masks = None
        if run.settings.data.poison_masks is not None:
            masks = {image.key: image.mask for image in images}
        changed |= poison.perturb(
            {image.key: image.pixels for image in images},
            masks=masks,
            micro_batch=together,
            state_folder=state and state / str(number),
        )
    records = [manifest(poison, key, x, changed[key]) for key, x in pixels.items()]
    summary = {"poison": run.record["data"]["poison"], "seed": seed, "pictures": records}
    whole = out.with_name(f"{out.name}.{uuid4().hex}.tmp")
    try:
        write_concepts([_with_pixels(concept, changed) for concept in clean], whole)
        write_whole(whole / "manifest.json", json.dumps(summary, indent=1))
        if overwrite and out.exists():
            shutil.rmtree(out)
        try:
            whole.rename(out)
        except OSError:  # another writer was first
            if not out.is_dir():
                raise
    finally:
        if whole.exists():
            shutil.rmtree(whole)
    return summary


def _with_pixels(concept: Concept, pixels: Mapping[str, Tensor]) -> Concept:
    images = [ConceptImage.of(concept.name, i.stem, pixels[i.key], i.mask, i.caption) for i in concept.images]
    return Concept.of(concept.name, images, concept.group)


def fingerprint(run: Training, model: LatentDiffusion, concepts: tuple[Concept, ...]) -> str:
    """What a poisoned set is made from: poison and its settings, seed, pipeline and pictures."""
    seed = run.seed if run.settings.data.poison_seed is None else run.settings.data.poison_seed
    masked = run.settings.data.poison_masks is not None
    parts = [run.record["data"]["poison"], masked, seed, model.digest(), [c.digest for c in concepts]]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

"""Poisoned concepts on disk: what a poison of concepts releases, and what runs keep of it.

A set appears whole, under its name, or not at all; of several writers one wins, and all of them wrote the same.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.engine.checkpoint import together
from poisonshield.errors import ConfigError
from poisonshield.files import draft_of, write_whole
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.poisons.diffusion.attack.manifest import manifest
from poisonshield.poisons.diffusion.base import DiffusionPoison
from poisonshield.runs.parts.training import Training
from poisonshield.runs.parts.words import load_model, open_concepts

log = logging.getLogger(__name__)

_PIXELS_TOGETHER = 2**18  # of pictures that a poison changes at once


def release(run: Training) -> Path:
    """Write the run's poisoned concepts to `<run.dir>/concepts`, lossless, with a manifest; a stopped one goes on.

    Raises ConfigError if the config names no poison or the folder holds a set already.
    """
    if run.poison is None:
        raise ConfigError(
            f"{run.origin} names no poison to write. Set data.poison, for example data.poison.name=advdm."
        )
    out, overwrite = Path(run.settings.run.dir) / "concepts", run.settings.run.overwrite
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} holds a set already. Choose another run.dir, or set run.overwrite=true.")
    _refuse_files_of_others(out)
    model = load_model(run.settings.model)
    clean = open_concepts(run.settings.data, model)
    state = out.with_name("concepts.unfinished")
    summary = poison_concepts(run, model, clean, out, state=state, overwrite=overwrite)
    log.info("written   %s; learn from it with data.train=%s data.poison=null", out, out)
    log.info("measured  %s", [record["measured"] for record in summary["pictures"]])
    return out


def _refuse_files_of_others(out: Path) -> None:
    """Raise ConfigError if the set that would give way holds what no set does."""
    others = [p for p in out.rglob("*") if p.is_file() and p.suffix not in (".png", ".json")]
    if others:
        raise ConfigError(f"{others[0]} is of no set of concepts, and would be lost with it. Move it away first.")


def apply_poison(
    run: Training, model: LatentDiffusion, clean: tuple[Concept, ...], folder: Path
) -> tuple[Concept, ...]:
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
    masks: Literal["file"] | None = None if clean[0].images[0].mask is None else "file"
    found = load_concepts(cache, size=clean[0].images[0].pixels.shape[-1], masks=masks)
    by_name = {concept.name: concept for concept in found}
    return tuple(by_name[concept.name] for concept in clean)


def fingerprint(run: Training, model: LatentDiffusion, concepts: tuple[Concept, ...]) -> str:
    """What a poisoned set is made from: poison and its settings, seed, pipeline and pictures."""
    masked = run.settings.data.poison_masks is not None
    parts = [run.record["data"]["poison"], masked, _seed(run), model.digest(), [c.digest for c in concepts]]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def poison_concepts(
    run: Training,
    model: LatentDiffusion,
    clean: tuple[Concept, ...],
    out: Path,
    *,
    state: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Perturb all pictures and write them as a concept folder with its manifest, which is returned.

    Masks are written along; the poison sees them only with data.poison_masks. state: where an unfinished one is kept.
    overwrite: a set that is there already gives way once the new one is whole; without it that one stays.
    """
    poison = run.poison.cls(run.poison.config, model=model, seed=_seed(run))
    refuse_long_prompts(poison)
    pixels = {image.key: image.pixels for concept in clean for image in concept.images}
    log.info("poison    %s on %d pictures", run.poison.name, len(pixels))
    masked = run.settings.data.poison_masks is not None
    # A surrogate learns one subject: where pictures meet in one, those of other concepts stay out.
    parts = [(concept,) for concept in clean] if poison.coupled else [clean]
    changed: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        changed |= _perturb(poison, part, masked=masked, state=state / str(number))
    records = [manifest(poison, key, x, changed[key]) for key, x in pixels.items()]
    summary = {"poison": run.record["data"]["poison"], "seed": _seed(run), "pictures": records}
    _write_set([_with_pixels(concept, changed) for concept in clean], summary, out, overwrite=overwrite)
    return summary


def refuse_long_prompts(poison: DiffusionPoison) -> None:
    """Raise ConfigError for a prompt of the poison that its model would read in part only."""
    settings = poison.config.model_dump()
    written = (value for name, value in settings.items() if name.endswith("prompt"))
    poison.model.tokens([poison.prompt, *filter(None, written)])


def _seed(run: Training) -> int:
    """The poison's."""
    return run.seed if run.settings.data.poison_seed is None else run.settings.data.poison_seed


def _perturb(poison: DiffusionPoison, part: tuple[Concept, ...], *, masked: bool, state: Path) -> dict[str, Tensor]:
    """The poisoned pixels of all pictures of some concepts, by key."""
    images = [image for concept in part for image in concept.images]
    return poison.perturb(
        {image.key: image.pixels for image in images},
        masks={image.key: image.mask for image in images} if masked else None,
        micro_batch=max(1, _PIXELS_TOGETHER // images[0].pixels[0].numel()),
        state_folder=state,
    )


def _write_set(concepts: list[Concept], summary: dict[str, Any], out: Path, *, overwrite: bool) -> None:
    """Write beside `out`, then rename. A set that is there already gives way with overwrite, else stays."""
    whole, aside = draft_of(out), draft_of(out)
    try:
        write_concepts(concepts, whole)
        write_whole(whole / "manifest.json", json.dumps(summary, indent=1))
        if overwrite and out.exists():
            out.rename(aside)
        try:
            whole.rename(out)
        except OSError:  # another writer was first
            if not out.is_dir():
                raise
    finally:
        if aside.exists() and not out.exists():  # what was there is not lost to a failure
            aside.rename(out)
        for folder in (whole, aside):
            if folder.exists():
                shutil.rmtree(folder)


def _with_pixels(concept: Concept, pixels: Mapping[str, Tensor]) -> Concept:
    """The concept with other pixels, by key, in its pictures' place."""
    images = [ConceptImage.of(concept.name, i.stem, pixels[i.key], i.mask, i.caption) for i in concept.images]
    return Concept.of(concept.name, images, concept.group)

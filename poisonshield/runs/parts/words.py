"""A checked textual inversion turned into objects: pipeline, concepts, method, defenses, stream and trainer."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from poisonshield import collectives
from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.kept_stage import KeptStage
from poisonshield.data.concepts.prompts import TEMPLATES
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.stream import ConceptStream
from poisonshield.data.stream import Stage
from poisonshield.data.summary import Summary
from poisonshield.defenses.base import Context, Defense
from poisonshield.engine.checkpoint import together
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.errors import ConfigError
from poisonshield.files import write_whole
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.pipeline import DTYPES, LatentDiffusion
from poisonshield.runs.parts.training import Training
from poisonshield.runs.parts.word_settings import RENDERED, ConceptData, ModelConfig, choose_token
from poisonshield.world import COLORS, HELD_OUT, SHAPES
from poisonshield.world.rendered import rendered_concepts

log = logging.getLogger(__name__)

_VARIANTS = 4  # where a defense draws backgrounds, a picture has so many in turn, few enough to keep their latents


def load_model(settings: ModelConfig) -> LatentDiffusion:
    """The frozen pipeline that a run names."""
    return LatentDiffusion.load(settings.pipeline, dtype=DTYPES[settings.dtype])


def open_concepts(data: ConceptData, model: LatentDiffusion) -> tuple[Concept, ...]:
    """The clean concepts of a run, with masks where anybody wants them.

    Raises DataError, or ConfigError for names that are not there.
    """
    if data.train == RENDERED:
        kinds = sorted(_parse_kind(name) for name in data.concepts or ("_".join(kind) for kind in HELD_OUT))
        return rendered_concepts(data.count, seed=data.rendered_seed, kinds=kinds)
    size = data.size or model.unet.config.sample_size * model.factor
    masks = data.masks or data.mask_reference or data.poison_masks
    summary = Summary(data.train)
    found = load_concepts(
        data.train, names=data.concepts, size=size, crop=data.crop, masks=masks, group=data.group, summary=summary
    )
    for line in summary.lines():
        log.info("data      %s", line)
    if data.left_out is not None:
        for concept in found:
            concept.leave_out(data.left_out)  # before hours of work, not after
    return found


def select_for_training(data: ConceptData, concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
    """The concepts without the picture that is left out, and without masks unless the run's defenses look at them."""
    if data.left_out is not None:
        concepts = tuple(concept.leave_out(data.left_out)[0] for concept in concepts)
    if data.masks is not None or data.mask_reference is not None:
        return concepts
    return tuple(
        Concept.of(c.name, [ConceptImage.of(c.name, i.stem, i.pixels, None, i.caption) for i in c.images], c.group)
        for c in concepts
    )


def _parse_kind(name: str) -> tuple[str, str]:
    """(colour, shape) of "yellow ring" or "yellow_ring"."""
    color, _, shape = name.replace("_", " ").partition(" ")
    if color not in COLORS or shape not in SHAPES:
        raise ConfigError(
            f"data.concepts: {name!r} is not of the rendered world. Write a colour and a shape, such as yellow ring:\n"
            f"  {', '.join(COLORS)}; {', '.join(SHAPES)}."
        )
    return color, shape


def build_defenses(run: Training, method: DiffusionMethod) -> list[Defense]:
    """The defenses in the order of the config."""
    context = Context(
        run.seed,
        model=method.model,
        words=tuple(method.start_word(method.config, name) for name in method.placeholders),
    )
    return [d.cls(d.config, context) for d in run.defenses]


def build_inversion(run: Training, model: LatentDiffusion, names: list[str]) -> tuple[DiffusionMethod, list[Defense]]:
    """The method with all defenses around it, and the defenses.

    Raises ConfigError for two placeholders that differ by <> alone, and for prompts that the model would cut off.
    """
    data = run.settings.data
    tokens = {name: choose_token(data, name) for name in names}
    plain = [token.strip("<>") for token in tokens.values()]
    if twice := next((name for name, p in zip(names, plain, strict=True) if plain.count(p) > 1), None):
        raise ConfigError(
            f"{tokens[twice]} and another placeholder differ by <> at most, and files go by the rest. "
            f"Set data.tokens.{twice}."
        )
    method = run.method.cls(run.method.config, model=model, tokens=tokens, seed=run.seed, samples=data.batch_size)
    generate = run.settings.generate
    model.tokens([p.replace("{}", t) for p in (*generate.recon, *generate.compose) for t in tokens.values()])
    model.tokens([p.replace("{}", t) for p in _templates(data) for t in tokens.values()])
    defenses = build_defenses(run, method)
    for defense in defenses:
        method = defense.wrap(method)
    return method, defenses


def _templates(data: ConceptData) -> Sequence[str]:
    """The texts around a word that pictures are learned under."""
    return TEMPLATES if isinstance(data.prompts, str) else data.prompts


def refuse_long_captions(data: ConceptData, method: DiffusionMethod, concepts: tuple[Concept, ...]) -> None:
    """Raise ConfigError for a caption that makes a prompt longer than the model reads."""
    if data.prompts == "caption":
        for concept in concepts:
            prompts = [t.replace("{}", method.placeholders[concept.name].token) for t in _templates(data)]
            method.model.tokens([f"{prompt}, {image.caption}" for image in concept.images for prompt in prompts])


def apply_defenses(defenses: Sequence[Defense], batch: Batch) -> Batch:
    """The batch as all defenses, one after the other, leave it."""
    for defense in defenses:
        batch = defense.before(batch)
    return batch


def batch_pictures(concepts: tuple[Concept, ...]) -> Batch:
    """Every picture of every concept, once; y says which concept's it is."""
    images = [image for concept in concepts for image in concept.images]
    masks = [image.mask for image in images if image.mask is not None]
    return Batch(
        keys=tuple(image.key for image in images),
        x=torch.stack([image.pixels for image in images]).float() / 255,
        y=torch.tensor([y for y, concept in enumerate(concepts) for _ in concept.images]),
        mask=torch.stack(masks) if len(masks) == len(images) else None,
        captions=tuple(image.caption for image in images),
    )


# What defenses find or make before the first step. Rank 0 does it, into a folder of the run that is named by everything
# it depends on; the other ranks, and a run that goes on after a stop, read it there.


def locate_prepared(run: Training, model: LatentDiffusion, concepts: tuple[Concept, ...], folder: Path) -> Path:
    """Where in a run folder lies what its defenses made of these pictures; another place for other settings."""
    settings = [run.record["method"], run.record["defenses"], run.record["data"], run.seed]
    depends_on = [*settings, model.digest(), [c.digest for c in concepts]]
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return folder / "prepared" / sha256(text.encode()).hexdigest()[:16]


def settle_surveys(
    defenses: Sequence[Defense], concepts: tuple[Concept, ...], method: DiffusionMethod, prepared: Path
) -> None:
    """Let every defense that asks for it look at all pictures at once, as the defenses before it leave them.

    Safe-Zone Training with t_min: auto does, to choose its first timestep.
    """
    for place, defense in enumerate(defenses):
        if defense.surveys:
            survey = partial(_read_or_survey, defense, defenses[:place], concepts, method, prepared / "t_min.json")
            found = together(survey, what=f"the survey of {defense.name}", only_first=True, patient=True)
            defense.settle(found)
            log.info("t_min     %s, chosen by %s", found, defense.name)


def _read_or_survey(
    defense: Defense,
    earlier: Sequence[Defense],
    concepts: tuple[Concept, ...],
    method: DiffusionMethod,
    file: Path,
) -> Any:
    """What the defense found on the pictures: read from the file, or found now and written there."""
    if not file.is_file():
        batch = apply_defenses(earlier, batch_pictures(concepts))
        words = [method.placeholders[c.name].token for c in concepts for _ in c.images]
        found = defense.survey(batch, method.vectors.detach(), [f"a photo of a {word}" for word in words])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found))
    return json.loads(file.read_text())


def build_concept_stream(
    run: Training,
    concepts: tuple[Concept, ...],
    method: DiffusionMethod,
    defenses: Sequence[Defense],
    prepared: Path | None = None,
) -> ConceptStream:
    """The training stream of this rank; every defense has seen each picture before the first step.

    prepared: a folder for pictures that networks purified or masked, which differ in last bits from device to device.
    """
    data = run.settings.data
    redraws = any(d.redraws for d in defenses)
    purify: Stage = partial(apply_defenses, defenses)
    if all(d.exact for d in defenses):
        prepared = None  # every rank makes the same bits by itself
    stream = ConceptStream(
        concepts,
        batch_size=data.batch_size,
        seed=run.seed,
        prompts=data.prompts,
        tokens={name: p.token for name, p in method.placeholders.items()},
        stage=purify if prepared is None else KeptStage(purify, prepared, partial(_note, defenses)),
        flip=data.flip,
        per_epoch=redraws,
        variants=_VARIANTS if redraws else None,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
    )
    if prepared is not None:
        together(stream.prepare, what="preparing pictures", only_first=True, patient=True)
    return stream


def _note(defenses: Sequence[Defense], given: Batch, made: Batch) -> None:
    """Show every defense what was read in place of what they would have made."""
    for defense in defenses:
        defense.note(given, made)


def build_trainer(
    run: Training,
    method: DiffusionMethod,
    defenses: Sequence[Defense],
    concepts: tuple[Concept, ...],
    folder: RunFolder,
    watch: Callable[[], Mapping[str, float | None]] | None = None,
) -> Trainer:
    """What trains the method on these concepts; surveys are settled and pictures prepared when it is there."""
    refuse_long_captions(run.settings.data, method, concepts)
    prepared = locate_prepared(run, method.model, concepts, folder.path)
    settle_surveys(defenses, concepts, method, prepared)
    return run.trainer(method, build_concept_stream(run, concepts, method, defenses, prepared), folder, watch)

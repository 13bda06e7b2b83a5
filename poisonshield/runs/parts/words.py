"""A checked textual inversion turned into objects: pipeline, concepts, method, defenses, stream and trainer."""

import json
import logging
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import torch

from poisonshield import collectives
from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.kept_stage import KeptStage
from poisonshield.data.concepts.reader import load_concepts
from poisonshield.data.concepts.stream import ConceptStream
from poisonshield.defenses.base import Context, Defense
from poisonshield.engine.checkpoint import together, write_whole
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.trainer import Trainer
from poisonshield.errors import ConfigError
from poisonshield.method import DiffusionMethod
from poisonshield.models.diffusion.pipeline import DTYPES, LatentDiffusion
from poisonshield.runs.parts.training import Training
from poisonshield.runs.parts.word_settings import RENDERED, ConceptData, ModelConfig, token_of
from poisonshield.world import COLORS, HELD_OUT, SHAPES
from poisonshield.world.rendered import rendered_concepts

log = logging.getLogger(__name__)

_VARIANTS = 4  # backgrounds of a picture that come in turn, where a defense draws them: their latents can be kept


def load_model(settings: ModelConfig) -> LatentDiffusion:
    """The frozen pipeline that a run names."""
    return LatentDiffusion.load(settings.pipeline, dtype=DTYPES[settings.dtype])


def open_concepts(data: ConceptData, model: LatentDiffusion) -> tuple[Concept, ...]:
    """The clean concepts of a run, with masks where anybody wants them. Raises DataError, or ConfigError for names that
    are not there."""
    if data.train == RENDERED:
        kinds = sorted(_kind(name) for name in data.concepts or ("_".join(kind) for kind in HELD_OUT))
        return rendered_concepts(data.count, seed=data.rendered_seed, kinds=kinds)
    size = data.size or model.unet.config.sample_size * model.factor
    masks = data.masks or data.mask_reference or data.poison_masks
    found = load_concepts(data.train, names=data.concepts, size=size, crop=data.crop, masks=masks, group=data.group)
    if data.left_out is not None:
        for concept in found:
            concept.leave_out(data.left_out)  # before hours of work, not after
    return found


def for_training(data: ConceptData, concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
    """The concepts without the picture that is left out, and without masks unless the run's defenses look at them."""
    if data.left_out is not None:
        concepts = tuple(concept.leave_out(data.left_out)[0] for concept in concepts)
    if data.masks is not None or data.mask_reference is not None:
        return concepts
    return tuple(
        Concept.of(c.name, [ConceptImage.of(c.name, i.stem, i.pixels, None, i.caption) for i in c.images], c.group)
        for c in concepts
    )


def _kind(name: str) -> tuple[str, str]:
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
    """The method with all defenses around it, and the defenses. Raises ConfigError for placeholders of one plain name."""
    data = run.settings.data
    tokens = {name: token_of(data, name) for name in names}
    plain = [token.strip("<>") for token in tokens.values()]
    if twice := next((name for name, p in zip(names, plain, strict=True) if plain.count(p) > 1), None):
        raise ConfigError(
            f"{tokens[twice]} and another placeholder differ by <> at most, and files go by the rest. Set data.tokens.{twice}."
        )
    method = run.method.cls(
        run.method.config,
        model=model,
        tokens=tokens,
        seed=run.seed,
        samples=data.batch_size,
    )
    defenses = build_defenses(run, method)
    for defense in defenses:
        method = defense.wrap(method)
    return method, defenses


def resolve_floors(defenses: list[Defense], concepts: tuple[Concept, ...], method: DiffusionMethod, kept: Path) -> None:
    """Lets a szt that chooses its timestep floor itself look at the pictures, every concept's together, as the defenses
    before it leave them. Rank 0 looks; the answer is kept in the folder `kept`, so that a restart has the same."""
    for place, defense in enumerate(defenses):
        if defense.surveys:
            look = lambda place=place, defense=defense: _floor(defenses[:place], defense, concepts, method, kept)
            defense.settle(together(look, what="choosing t_min", only_first=True, patient=True))
            log.info("t_min     %d, chosen by %s", defense.t_range[0], defense.name)


def _floor(
    before: list[Defense], szt: Defense, concepts: tuple[Concept, ...], method: DiffusionMethod, kept: Path
) -> int:
    file = kept / "t_min.json"
    if not file.is_file():
        batch = whole_batch(concepts)
        for defense in before:
            batch = defense.before(batch)
        prompts = [f"a photo of a {method.placeholders[concepts[y].name].token}" for y in batch.y.tolist()]
        found = szt.survey(batch, method.vectors.detach(), prompts)
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found))
    return json.loads(file.read_text())


def kept_in(run: Training, model: LatentDiffusion, concepts: tuple[Concept, ...], folder: Path) -> Path:
    """Where in a run folder lies what its defenses made of these pictures; another place for other settings."""
    parts = [run.record["method"], run.record["defenses"], run.record["data"], run.seed, model.digest()]
    told = json.dumps([*parts, [c.digest for c in concepts]], sort_keys=True, default=str)
    return folder / "prepared" / sha256(told.encode()).hexdigest()[:16]


def whole_batch(concepts: tuple[Concept, ...]) -> Batch:
    """Every picture of every concept, once."""
    images = [(image, y) for y, concept in enumerate(concepts) for image in concept.images]
    masks = [image.mask for image, _ in images]
    return Batch(
        keys=tuple(image.key for image, _ in images),
        x=torch.stack([image.pixels for image, _ in images]).float() / 255,
        y=torch.tensor([y for _, y in images]),
        mask=None if any(m is None for m in masks) else torch.stack(masks),
        captions=tuple(image.caption for image, _ in images),
    )


def build_concept_stream(
    run: Training,
    concepts: tuple[Concept, ...],
    method: DiffusionMethod,
    defenses: list[Defense],
    kept: Path | None = None,
) -> ConceptStream:
    """The training stream of this rank; every defense has seen each picture before the first step.

    kept: a folder for pictures that networks purified or masked. Rank 0 makes them there; the others and restarts read.
    """
    data = run.settings.data
    fresh = any(d.redraws for d in defenses)

    def stage(batch: Batch) -> Batch:
        for defense in defenses:
            batch = defense.before(batch)
        return batch

    def seen(given: Batch, made: Batch) -> None:
        for defense in defenses:
            defense.note(given, made)

    inexact = kept is not None and not all(d.exact for d in defenses)
    stream = ConceptStream(
        concepts,
        batch_size=data.batch_size,
        seed=run.seed,
        prompts=data.prompts,
        tokens={name: p.token for name, p in method.placeholders.items()},
        stage=KeptStage(stage, kept, seen) if inexact else stage,
        flip=data.flip,
        per_epoch=fresh,
        variants=_VARIANTS if fresh else None,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
    )
    if inexact:
        together(stream.prepare, what="preparing pictures", only_first=True, patient=True)
    return stream


def build_trainer(
    run: Training,
    method: DiffusionMethod,
    defenses: list[Defense],
    concepts: tuple[Concept, ...],
    folder: RunFolder,
    watch: Callable[[], Mapping[str, float | None]] | None = None,
) -> Trainer:
    """What trains the method on these concepts; floors are settled and pictures prepared when it is there."""
    kept = kept_in(run, method.model, concepts, folder.path)
    resolve_floors(defenses, concepts, method, kept)
    return run.trainer(method, build_concept_stream(run, concepts, method, defenses, kept), folder, watch)

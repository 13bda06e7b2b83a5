"""Textual inversion from Python: some pictures in, learned words out, with files of configs/invert as presets.

The same method, stream and trainer as `poisonshield train` uses, and the same checks of settings; only the config file
is missing. The model comes back as it was: new words live in a copy of its tokenizer while they are trained.

    learned = train_many(LatentDiffusion.load("tiny"), {"my toy": pixels}, szt=SZT.Config(mask="box"), steps=300)
    with words(model, learned.values()) as rows:
        x = sample(model, model.prompts(["a photo of a <my-toy>"], rows), noise=...)
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.config import Tree, configs_folder, load_tree
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.defenses.diffusion.szt import SZT
from poisonshield.engine.checkpoint import random_states, restore_random_states
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import ConfigError, DataError
from poisonshield.models.diffusion.embeddings import Learned
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.registry import suggest
from poisonshield.runs.invert import Invert
from poisonshield.runs.parts.words import build_inversion, build_trainer, select_for_training

PRESETS = ("diffusers", "sdv1", "szt", "szt_long")
"""Config files of configs/invert that stand for a recipe, and not for certain pictures."""

_EXAMPLE = "toy"  # the word that these files start from, for which a command line or a caller gives another


def train_many(
    model: LatentDiffusion,
    concepts: Mapping[str, Concept | Tensor],
    *,
    preset: str = "szt",
    szt: SZT.Config | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    tokens: Mapping[str, str] | None = None,
    run_dir: str | Path | None = None,
    **method: Any,
) -> dict[str, Learned]:
    """A word for each concept, all in one batch; each learns what it would learn alone. Trains where the model is,
    a CPU or this process's GPU.

    concepts: by name, pixels uint8 [n, 3, H, W], or a Concept, whose masks are used if the defense wants masks (szt
    does by default).
    szt: in place of the preset's defense, or beside a preset that has none.
    steps, lr: by default the preset's. batch: samples of each concept in a step.
    tokens: name -> placeholder, by default <name>.
    run_dir: keeps checkpoints and metrics, and goes on with an unfinished run of the same settings that it holds; None
    for none of it.
    method: settings of TextualInversion.Config, such as vectors=2 or init="toy", the word to start from.

    Raises ConfigError with every setting that does not fit, DataError and ShapeError naming the picture.
    """
    if not concepts:
        raise ConfigError("train_many got no concept. Give {name: pixels uint8 [n, 3, H, W]}, or Concepts.")
    given = tuple(_as_concept(name, value) for name, value in concepts.items())
    run = preset_run(
        model, preset=preset, szt=szt, steps=steps, batch=batch, lr=lr, seed=seed, tokens=tokens, run_dir=run_dir,
        method=method,
    )  # fmt: skip
    with _borrow_vocabulary(model), _keep_random_states():
        return _train(run, model, select_for_training(run.settings.data, given), run_dir)


def train_textual_inversion(
    model: LatentDiffusion, concept: Concept | Tensor, *, name: str | None = None, **settings: Any
) -> Learned:
    """One word.

    name: of the concept, by default the Concept's own, or "concept" for pixels. settings: see train_many.
    """
    name = name or (concept.name if isinstance(concept, Concept) else "concept")
    return train_many(model, {name: concept}, **settings)[name]


@contextmanager
def words(model: LatentDiffusion, learned: Iterable[Learned]) -> Iterator[Tensor]:
    """While open, the model knows these words; gives their rows [R, d] for `model.prompts`. Then it forgets them again.

    Raises ConfigError for no word, one that the vocabulary knows, or vectors of another width than the model's.
    """
    learned = tuple(learned)
    if not learned:
        raise ConfigError("words got no word. Give what train_many returned, or load_embedding read.")
    if wrong := [w for w in learned if w.vectors.shape[1] != model.width]:
        raise ConfigError(
            f"{wrong[0].token} has vectors {wrong[0].vectors.shape[1]} wide, and {model.name} wants {model.width}: it "
            "was learned with another text encoder."
        )
    with _borrow_vocabulary(model):
        for word in learned:
            model.add_placeholder(word.token, len(word.vectors))
        yield torch.cat([word.vectors for word in learned]).to(model.alphas_cumprod.device)


def _train(
    run: Invert, model: LatentDiffusion, concepts: tuple[Concept, ...], run_dir: str | Path | None
) -> dict[str, Learned]:
    """Training on this process, or on all that a launcher started; every rank gets all words."""
    with processes(run.settings.engine, seed=run.seed) as device, _open_folder(run_dir) as folder:
        _refuse_another_gpu(model.alphas_cumprod.device, device)
        method, defenses = build_inversion(run, model, [c.name for c in concepts])
        trainer = build_trainer(run, method, defenses, concepts, RunFolder(folder, keeps=("prepared",)))
        trainer.fit()
        vectors = collectives.broadcast_object(trainer.state_dict().get("vectors"))
    method.vectors = nn.Parameter(vectors)
    return {c.name: Learned(method.placeholders[c.name].token, method.rows(c.name).clone()) for c in concepts}


def preset_run(
    model: LatentDiffusion,
    *,
    preset: str = "szt",
    szt: SZT.Config | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    tokens: Mapping[str, str] | None = None,
    run_dir: str | Path | None = None,
    method: Mapping[str, Any] | None = None,
) -> Invert:
    """The preset with what the caller says instead (see train_many), checked as a config file is.

    Raises one ConfigError that lists every problem.
    """
    values = _read_preset(preset) | {"seed": seed, "run": {"dir": str(run_dir or "")}}
    values["model"] = {"pipeline": model.name, "dtype": "bf16" if model.dtype == torch.bfloat16 else "fp32"}
    values["data"] |= {"train": "given", "tokens": dict(tokens or {})}
    values["method"] |= method or {}
    values["engine"] |= {"device": model.alphas_cumprod.device.type, "resume": "auto"}
    if szt is not None:
        values["defenses"] = [{"name": SZT.name, **szt.model_dump(mode="json")}]
        values["data"]["masks"] = SZT(szt).wants_masks
    for section, key, value in (("engine", "max_steps", steps), ("data", "batch_size", batch), ("optimizer", "lr", lr)):
        if value is not None:
            values[section][key] = value
    return Invert(Tree(values), Path("train_many"))


def _read_preset(preset: str) -> dict[str, Any]:
    """What a preset's file says of training; its pictures, pipeline and word are the caller's affair."""
    if preset not in PRESETS:
        raise ConfigError(f"{preset!r} is no preset.{suggest(preset, list(PRESETS))}  Known: {', '.join(PRESETS)}")
    file = load_tree(configs_folder() / "invert" / f"{preset}.yaml").values
    sections = {name: file[name] for name in ("method", "defenses", "optimizer", "schedule", "engine") if name in file}
    if sections["method"].get("init") == _EXAMPLE:
        del sections["method"]["init"]
    data = {name: file["data"][name] for name in ("batch_size", "masks", "prompts") if name in file["data"]}
    return sections | {"data": data}


def _refuse_another_gpu(place: torch.device, ours: torch.device) -> None:
    """Raise ConfigError for a model on a GPU that is not this process's: training would move it."""
    if place.type == ours.type == "cuda" and place != ours:
        raise ConfigError(
            f"the model is on {place}, and this process trains on {ours}. Move it there, or start with "
            f"CUDA_VISIBLE_DEVICES={place.index}, which makes that GPU the first."
        )


def _as_concept(name: str, value: Concept | Tensor) -> Concept:
    """The concept under this name."""
    if isinstance(value, Concept):
        if value.name == name:
            return value
        images = [ConceptImage.of(name, i.stem, i.pixels, i.mask, i.caption) for i in value.images]
        return Concept.of(name, images, value.group)
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 4 or value.shape[1] != 3:
        what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(
            f"the pictures of {name!r} are {what}; uint8 [n, 3, H, W] is wanted, or a Concept.\n"
            "  Pixels in [0, 1] become it by (x * 255).round().to(torch.uint8)."
        )
    return Concept.of(name, [ConceptImage.of(name, f"{i:02d}", pixels) for i, pixels in enumerate(value.cpu())])


@contextmanager
def _borrow_vocabulary(model: LatentDiffusion) -> Iterator[None]:
    """Words that are added within are gone afterwards. Raises ConfigError if some were added before."""
    if model.placeholders:
        raise ConfigError(
            f"{model.name} knows {', '.join(model.placeholders)} already, whose vectors are not given here.\n"
            "  Load the pipeline anew. To use learned words for a while, open poisonshield.api.words(model, learned)."
        )
    tokenizer = model.tokenizer
    model.tokenizer, model.placeholders = copy.deepcopy(tokenizer), {}
    try:
        yield
    finally:
        model.tokenizer, model.placeholders = tokenizer, {}


@contextmanager
def _keep_random_states() -> Iterator[None]:
    """The caller's global random generators go on as if nothing had happened."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def _open_folder(run_dir: str | Path | None) -> Iterator[Path]:
    """The run folder, or one that is gone afterwards; rank 0's, on a disk that all ranks see."""
    if run_dir is not None:
        yield Path(run_dir)
        return
    made = tempfile.TemporaryDirectory(prefix="poisonshield-") if collectives.rank() == 0 else None
    try:
        yield Path(collectives.broadcast_object(made and made.name))
        collectives.barrier()
    finally:
        if made is not None:
            made.cleanup()

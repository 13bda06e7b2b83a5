"""InvertConfig: the settings of a textual inversion, how they are read and what is checked before anything starts.

`read_invert` touches no process group, data or network: every mistake in a config is reported from here, all at once.
build_diffusion.py makes objects of what it returns.
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from poisonshield.build import DEFENSES, RunSection
from poisonshield.config import Checker, Choice, Settings, Tree, dump, load_tree
from poisonshield.defenses.diffusion.szt import MASKS, SZT
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.evals.diffusion.parts.settings import WordEvaluateConfig
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.registry import Registry

DIFFUSION_DEFENSES = Registry("poisonshield.defenses.diffusion", kind="defense")
DIFFUSION_POISONS = Registry("poisonshield.poisons.diffusion", kind="diffusion poison")
RENDERED = "rendered"


class ModelConfig(Settings):
    """pipeline: a diffusers Stable Diffusion folder, or tiny for the shipped one. dtype: of its frozen networks."""

    pipeline: str = "tiny"
    dtype: Literal["fp32", "bf16"] = "fp32"


class ConceptData(Settings):
    """What is learned from.

    train: a folder of pictures (one concept), of such folders, in NC10's form or of WebDataset tars; or `rendered`, with
    `concepts` such as [yellow ring] and `count` pictures each, drawn from rendered_seed (0 is what pipelines train on).
    concepts: which ones, null for all. group: NC10's split.
    size: pixels a side, null for the pipeline's own. masks: null, file or alpha; read only if a defense uses them.
    mask_reference: the same, for masks that szt makes itself to be compared with; nothing learns from them.
    poison_masks: the same for the attacker; what the poison does with them is a setting of its own (`mask`).
    left_out: number of the picture of each concept, by file name, that is not learned from; generated pictures are
    compared with it alone.
    tokens: concept -> placeholder, by default <name>. prompts: templates, caption, or a list of texts with {}.
    batch_size: of each concept. poison: null, or a block with `name:`; its pictures are kept in poison_cache (by default
    in the run folder). poison_seed: null for the run's.
    """

    train: str = RENDERED
    concepts: tuple[str, ...] | None = None
    group: Literal["all", "id", "od"] = "all"
    count: int = Field(5, ge=1)
    rendered_seed: int = Field(1, ge=1)
    size: int | None = Field(None, ge=8)
    crop: Literal["center", "squash"] = "center"
    masks: Literal["file", "alpha"] | None = None
    mask_reference: Literal["file", "alpha"] | None = None
    left_out: int | None = Field(None, ge=0)
    tokens: dict[str, str] = {}
    prompts: Literal["templates", "caption"] | tuple[str, ...] = "templates"
    flip: float = Field(0.5, ge=0, le=1)
    batch_size: int = Field(4, ge=1)
    poison: Any = None
    poison_seed: int | None = Field(None, ge=0)
    poison_cache: str | None = None
    poison_masks: Literal["file", "alpha"] | None = None


class GenerateConfig(Settings):
    """Pictures made from what was learned, and the numbers read off them. All runs of one seed share their noise.

    recon, compose: prompts with {} for the concept. count: pictures of a prompt group and concept. every_steps: pictures
    while training, at the next logged step; null for none. switch: below t_min, generate with the initial word.
    references: unseen pictures of a rendered concept to compare with; a folder's own pictures otherwise. clean: folder
    of these before they were poisoned, where the run did not poison them itself.
    """

    recon: tuple[str, ...] = Field(("a photo of a {}",), min_length=1)
    compose: tuple[str, ...] = ()
    count: int = Field(50, ge=1)
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=0)
    seed: int = Field(42, ge=0)
    every_steps: int | None = Field(None, ge=1)
    switch: bool = False
    references: int = Field(64, ge=1)
    clean: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _features_moved(cls, values: Any) -> Any:
        if isinstance(values, dict) and "features" in values:
            raise ValueError("features is called evaluate.networks.folders now. Write that instead.")
        return values

    @field_validator("recon", "compose")
    @classmethod
    def _prompts_hold_the_word(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.replace("{}", "", 1).count("{") or "{}" not in prompt:
                raise ValueError(f"{prompt!r} must have one {{}} where the learned word belongs, and no other braces")
        return prompts


class InvertConfig(Settings):
    """One textual inversion. `method`, `defenses` and `data.poison` pick a class by `name:`."""

    seed: int = Field(0, ge=0)
    run: RunSection
    data: ConceptData = ConceptData()
    model: ModelConfig = ModelConfig()
    method: Any
    defenses: Any = ()
    optimizer: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig(name="constant")
    engine: EngineConfig
    generate: GenerateConfig = GenerateConfig()
    evaluate: WordEvaluateConfig = WordEvaluateConfig()


@dataclass(frozen=True)
class InvertRun:
    """A checked experiment: plain settings, picked classes, and the record to write down."""

    settings: InvertConfig
    method: Choice
    defenses: tuple[Choice, ...]
    poison: Choice | None
    record: dict[str, Any]
    origin: Path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.seed

    @property
    def poison_label(self) -> str:
        """How result tables call the poison that the run itself applies."""
        return "none" if self.poison is None else self.poison.name

    @property
    def defense_label(self) -> str:
        """How result tables call the defenses together."""
        return "+".join(d.cls(d.config, num_classes=1, seed=0).label for d in self.defenses) or "none"


def is_invert(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> bool:
    """Whether a config is of this kind: its method is one of the methods on latent diffusion models."""
    method = load_tree(path, overrides).values.get("method")
    return (method.get("name") if isinstance(method, dict) else method) == TextualInversion.name


def read_invert(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> InvertRun:
    """The checked run of a config file and its overrides. Raises one ConfigError that lists every problem with its line."""
    return check_invert(load_tree(path, overrides), Path(path))


def check_invert(tree: Tree, origin: Path) -> InvertRun:
    """The same of settings that are read already."""
    checker = Checker(tree)
    settings = checker.settings(InvertConfig, (), tree.values, owner="a textual inversion")
    method = checker.choice(
        Registry("poisonshield.methods.diffusion", kind="method"), ("method",), tree.values.get("method")
    )
    blocks = tree.values.get("defenses") or []
    if not isinstance(blocks, list):
        checker.problem(("defenses",), "defenses: a list is wanted, one `- name: ...` entry per defense (or []).")
        blocks = []
    defenses = tuple(_pick_defense(checker, ("defenses", i), block) for i, block in enumerate(blocks))
    data = tree.values.get("data")
    block, poison = data.get("poison") if isinstance(data, dict) else None, None
    if block is not None:
        poison = checker.choice(DIFFUSION_POISONS, ("data", "poison"), block)
    if settings is not None and method is not None and None not in defenses:
        _check_pairs(checker, settings, method, defenses)
    checker.finish()
    record = dump(settings, tree.values)
    record["method"] = _record(method, tree.values["method"])
    record["defenses"] = [_record(d, b) for d, b in zip(defenses, blocks, strict=True)]
    if poison is not None:
        record["data"]["poison"] = _record(poison, block)
    return InvertRun(settings, method, defenses, poison, record, origin)


def _pick_defense(checker: Checker, path: tuple, block: Any) -> Choice | None:
    """A defense for diffusion, or a purifier of any kind of training."""
    name = block.get("name") if isinstance(block, dict) else block
    if name in DIFFUSION_DEFENSES.names():
        return checker.choice(DIFFUSION_DEFENSES, path, block)
    choice = checker.choice(DEFENSES, path, block)
    if choice is not None and not choice.cls.purifier:
        checker.problem(
            path, f"defenses[{path[1]}]: {name} defends the training of classifiers. Use a purifier, or szt."
        )
        return None
    return choice


def _check_pairs(checker: Checker, settings: InvertConfig, method: Choice, defenses: tuple[Choice, ...]) -> None:
    zones = [d for d in defenses if d.cls is SZT]
    wants = [d.config.mask for d in zones if d.config.mask in ("file", "alpha")]
    if len(zones) > 1:
        checker.problem(("defenses",), "defenses: szt stands there twice. Keep one.")
    if settings.data.masks is not None and not wants:
        checker.problem(
            ("data", "masks"),
            f"data.masks: {settings.data.masks} is given, and no defense uses it. Add szt with mask: "
            f"{settings.data.masks}, or set data.masks: null. To compare masks that szt makes with them, set "
            f"data.mask_reference: {settings.data.masks} instead.",
        )
    if settings.data.mask_reference is not None and not any(d.config.mask in MASKS.names() for d in zones):
        checker.problem(
            ("data", "mask_reference"),
            f"data.mask_reference: {settings.data.mask_reference} is given, and szt makes no mask to compare with it. Set "
            f"szt's mask to {', '.join(MASKS.names())}, or leave the reference out.",
        )
    if wants and settings.data.masks is None:
        checker.problem(
            ("data",), f"szt wants masks from {wants[0]}, and data.masks is null. Set data.masks: {wants[0]}."
        )
    if wants and settings.data.masks not in (None, wants[0]):
        checker.problem(
            ("data", "masks"), f"data.masks is {settings.data.masks}, and szt wants {wants[0]}. Make them equal."
        )
    if settings.engine.precision != "fp32":
        checker.problem(
            ("engine", "precision"),
            "engine.precision: learned vectors stay in fp32. For frozen networks in bf16 set model.dtype: bf16.",
        )
    _check_data(checker, settings, method)
    # Sharded optimisers move copies of their own, which after_step never sees.
    if method.config.keep_norm and settings.engine.zero_stage > 0:
        checker.problem(
            ("method", "keep_norm"),
            f"method.keep_norm moves the vectors after each step, and engine.zero_stage {settings.engine.zero_stage} would "
            "put them back. Set zero_stage: 0, or backend: plain; vectors are too few to be worth sharding.",
        )


def _check_data(checker: Checker, settings: InvertConfig, method: Choice) -> None:
    """Settings that nothing would use, and a switch without a word to switch to."""
    data, generate = settings.data, settings.generate
    if data.poison is None:
        for name in ("poison_masks", "poison_seed"):
            if getattr(data, name) is not None:
                checker.problem(("data", name), f"data.{name} is given, and data.poison is null. Leave it out.")
    kinds = {name: getattr(data, name) for name in ("masks", "mask_reference", "poison_masks") if getattr(data, name)}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"data.{name} is {kind}" for name, kind in kinds.items())
        checker.problem(("data", list(kinds)[-1]), f"{told}: pictures are read with one kind of mask. Make them equal.")
    if data.train == RENDERED:
        for name, unused in (
            ("size", data.size is not None),
            ("group", data.group != "all"),
            ("crop", data.crop != "center"),
        ):
            if unused:
                checker.problem(
                    ("data", name), f"data.{name} does nothing to rendered pictures, which are 64 px. Leave it out."
                )
        if data.left_out is not None:
            checker.problem(
                ("data", "left_out"), "data.left_out: rendered concepts are compared with fresh pictures. Leave it out."
            )
        if generate.clean is not None:
            checker.problem(
                ("generate", "clean"), "generate.clean: rendered concepts have fresh clean pictures. Leave it out."
            )
    inits = method.config.init.values() if isinstance(method.config.init, dict) else [method.config.init]
    if generate.switch and any(start_word(init) is None for init in inits):
        checker.problem(
            ("generate", "switch"),
            "generate.switch speaks the word that learning started from, and method.init is numbers. Give a word.",
        )


def start_word(init: str) -> str | None:
    """The word that an entry of method.init names; None for zeros and normal:STD."""
    return None if init == "zeros" or init.startswith("normal:") else init


def _record(choice: Choice, block: Any) -> dict[str, Any]:
    return {"name": choice.name, **dump(choice.config, block if isinstance(block, dict) else {})}


def token_of(data: ConceptData, name: str) -> str:
    """The placeholder of a concept: the config's, or its name in angle brackets."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return data.tokens.get(name) or f"<{plain or sha256(name.encode()).hexdigest()[:8]}>"

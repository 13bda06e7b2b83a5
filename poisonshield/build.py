"""RunConfig, and the functions that turn it into objects. The one place where methods, defenses, poisons and data meet.

`read_run` touches no process group, data or network: every mistake in a config is reported from here, all at once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from poisonshield import collectives
from poisonshield.batch import Batch
from poisonshield.config import Checker, Choice, Settings, dump, load_tree
from poisonshield.data import ResidentSource, ShardSet, ShardStream, Source, evaluate_batches, open_dataset
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.defenses.base import Defense
from poisonshield.engine.optim import OptimConfig, parameter_groups
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import ConfigError, DataError
from poisonshield.evals.parts.settings import EvaluateConfig
from poisonshield.method import Method
from poisonshield.models.backbones import BackboneConfig, build_encoder
from poisonshield.models.batchnorm import synchronize
from poisonshield.poisons.base import Poison
from poisonshield.poisons.release.recipe import ENDING, load_recipe, read_recipe
from poisonshield.registry import Registry

METHODS = Registry("poisonshield.methods", kind="method")
DEFENSES = Registry("poisonshield.defenses", kind="defense")
POISONS = Registry("poisonshield.poisons", kind="poison")


class RunSection(Settings):
    """dir: the run folder. overwrite: replace what another run left there."""

    dir: str
    overwrite: bool = False


class DataConfig(Settings):
    """What to train and test on.

    train, test: a bundled name, or a folder with a manifest (or with train/ and test/ in it); test null takes the test
    split of `train`. poison: null, a poison's name, a block with `name:`, or the path of a recipe file: applied to the
    training pixels while loading; poison_ratio is the share of samples it takes. batch_size is global. source: resident
    holds decoded pixels in memory, auto does so up to resident_mib. verify: once trusts a verified index until files change.
    """

    train: str = "cifar10-mini"
    test: str | None = None
    poison: Any = None
    poison_ratio: float = Field(1.0, ge=0, le=1)
    batch_size: int = Field(128, ge=1)
    source: Literal["auto", "resident", "tar"] = "auto"
    resident_mib: int = Field(4096, ge=0)
    workers: int = Field(0, ge=0)
    window: int = Field(16, ge=1)
    verify: Literal["always", "once"] = "always"


class ForgeConfig(Settings):
    """What `poisonshield poison` writes into the run folder: lossless shards, a recipe of some kilobytes, or both."""

    format: Literal["shards", "recipe", "both"] = "both"
    samples_per_shard: int = Field(5000, ge=1)


class RunConfig(Settings):
    """One experiment. `method`, `defenses` and `data.poison` pick a class by `name:`; the rest of their block is its Config."""

    seed: int = Field(0, ge=0)
    run: RunSection
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: BackboneConfig = BackboneConfig()
    method: Any
    defenses: Any = ()
    optimizer: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    forge: ForgeConfig = ForgeConfig()


@dataclass(frozen=True)
class Run:
    """A checked experiment: the plain settings, the picked classes, and the record to write down.

    poison is a Choice, the path of a recipe file, or None. origin: the file it was read from.
    """

    settings: RunConfig
    method: Choice
    defenses: tuple[Choice, ...]
    poison: Choice | Path | None
    record: dict[str, Any]
    origin: Path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings.seed

    @property
    def poison_label(self) -> str:
        """How result tables call the poison that the run itself applies."""
        if self.poison is None:
            return "none"
        return read_recipe(self.poison)[0].name if isinstance(self.poison, Path) else self.poison.name

    @property
    def defense_label(self) -> str:
        """How result tables call the defenses together."""
        return "+".join(d.cls(d.config, num_classes=1, seed=0).label for d in self.defenses) or "none"


def read_run(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Run:
    """The checked run of a config file and its overrides. Raises one ConfigError that lists every problem with its line."""
    tree = load_tree(path, overrides)
    checker = Checker(tree)
    settings = checker.settings(RunConfig, (), tree.values, owner="a run")
    method = checker.choice(METHODS, ("method",), tree.values["method"]) if "method" in tree.values else None
    blocks = tree.values.get("defenses") or []
    if not isinstance(blocks, list):
        checker.problem(
            ("defenses",), "defenses: a list is wanted, one `- name: ...` entry per defense (or [] for none)."
        )
        blocks = []
    defenses = tuple(checker.choice(DEFENSES, ("defenses", i), block) for i, block in enumerate(blocks))
    poison = _pick_poison(checker, (tree.values.get("data") or {}))
    if settings is not None and method is not None and None not in defenses:
        _check_pairs(checker, settings, method, defenses)
    if isinstance(poison, Path) and settings is not None and settings.data.poison_ratio < 1:
        checker.problem(("data", "poison_ratio"), "data.poison_ratio: a recipe brings its own. Leave it out.")
    checker.finish()
    record = dump(settings, tree.values)
    record["method"] = _record(method, tree.values["method"])
    record["defenses"] = [_record(d, b) for d, b in zip(defenses, blocks, strict=True)]
    if isinstance(poison, Choice):
        record["data"]["poison"] = _record(poison, tree.values["data"]["poison"])
    # The record keeps lr as written; from here on it is the peak.
    settings = settings.model_copy(update={"optimizer": settings.optimizer.for_batch(settings.data.batch_size)})
    return Run(settings, method, defenses, poison, record, Path(path))


def _pick_poison(checker: Checker, data: Any) -> Choice | Path | None:
    block = data.get("poison") if isinstance(data, dict) else None
    if block is None:
        return None
    if isinstance(block, str) and ("/" in block or block.endswith(ENDING)):
        if not Path(block).is_file():
            checker.problem(
                ("data", "poison"),
                f"data.poison: there is no recipe file {block}. Write one with `poisonshield poison`.",
            )
        return Path(block)
    return checker.choice(POISONS, ("data", "poison"), block)


def _record(choice: Choice, block: Any) -> dict[str, Any]:
    return {"name": choice.name, **dump(choice.config, block if isinstance(block, dict) else {})}


def _check_pairs(checker: Checker, settings: RunConfig, method: Choice, defenses: tuple[Choice, ...]) -> None:
    """Pairs that cannot work together, found by building the whole stack around an empty encoder."""
    with torch.random.fork_rng(devices=[]):
        encoder = torch.nn.Identity()
        encoder.feature_dim = 1
        try:
            inner = _viewing(method.cls(method.config, encoder=encoder, num_classes=2), settings)
        except ConfigError as err:
            checker.problem(("method",), f"method: {err}")
            return
        for i, choice in enumerate(defenses):
            try:
                defense = choice.cls(choice.config, num_classes=2, seed=0)
                if settings.engine.zero_stage == 3 and not defense.ranks_stay_in_step:
                    raise ConfigError(
                        f"with engine.zero_stage: 3 every forward pass gathers weights, and these settings of {choice.name} let "
                        "each rank stop its attack by itself. Use zero_stage 2 or less, or all steps for all."
                    )
                inner = defense.wrap(inner)
            except ConfigError as err:
                checker.problem(("defenses", i), f"defenses[{i}]: {err}")
                return
    try:
        settings.optimizer.check_sharding(settings.engine.zero_stage)
        parameter_groups(inner, settings.optimizer)
    except ConfigError as err:
        checker.problem(("optimizer",), str(err))
    if settings.data.batch_size < 2:
        checker.problem(("data", "batch_size"), "data.batch_size: batch norm needs at least 2 samples.")


@dataclass(frozen=True)
class OpenData:
    """The opened and verified data sets of a run; the test images are decoded already where they fit."""

    train: ShardSet
    test: Source

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.train.classes)


def open_data(run: Run) -> OpenData:
    """Opens and verifies both sets. Raises DataError if they do not fit each other, or the test images are not clean."""
    data, train = run.settings.data, open_train(run)
    test = open_dataset(data.test or data.train, "test", verify=data.verify)
    if train.classes != test.classes:
        raise DataError(
            f"{data.train} has {len(train.classes)} classes, {data.test or data.train} has {len(test.classes)}, or their names or "
            "order differ. Import both with the same class list."
        )
    if train.digest == test.digest:
        raise DataError(
            f"data.train and data.test are the same set ({data.train}); accuracy on it would mean nothing.\n"
            "  Set data.test to the clean test images."
        )
    if test.manifest.poison is not None:
        raise DataError(
            f"{test.folder} is poisoned, and accuracy is measured on clean images only.\n"
            "  Set data.test to the clean test images."
        )
    if train.image_size != test.image_size:
        raise DataError(
            f"images of {train.folder} are {train.image_size}, those of {test.folder} are {test.image_size} (height, width).\n"
            "  Import both with one --size."
        )
    return OpenData(train, ResidentSource(test) if _is_held(run, test) else test)


def open_train(run: Run) -> ShardSet:
    """Opens and verifies the training set. Raises DataError if it is poisoned and the run would poison it again."""
    data = run.settings.data
    train = open_dataset(data.train, "train", verify=data.verify)
    if train.manifest.poison is not None and run.poison is not None:
        raise DataError(
            f"{train.folder} is poisoned already ({train.manifest.poison.get('name', 'by an unnamed poison')}), and "
            "data.poison would poison it again.\n  Set data.poison=null, or data.train to the clean images."
        )
    return train


def _is_held(run: Run, source: ShardSet) -> bool:
    """Whether the decoded pixels of a set are to be held in memory."""
    settings, size = run.settings.data, source.image_size
    fits = size is not None and len(source) * 3 * size[0] * size[1] <= settings.resident_mib * 2**20
    return settings.source == "resident" or (settings.source == "auto" and fits)


def build_poison(
    run: Run, source: ShardSet, *, watch: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
) -> Poison | None:
    """The run's poison, ready to apply to the training set; fitted to it where it needs to see the data.

    watch: wraps the batches that it is fitted to, to time or to count them.
    """
    if run.poison is None:
        return None
    if isinstance(run.poison, Path):
        return load_recipe(run.poison, classes=source.classes, image_size=source.image_size, data=source.digest)
    cls = run.poison.cls
    if source.image_size is None:
        raise DataError(
            f"poison {cls.name} needs images of one size, and {source.folder} holds several. Import it with --size."
        )
    poison = cls(run.poison.config, num_classes=len(source.classes), image_size=source.image_size, seed=run.seed)
    if cls.needs_data:
        poison.fit(watch(evaluate_batches(source, batch_size=1000)))
    else:
        poison.fit(())
    if run.settings.data.poison_ratio < 1:
        poison.choose(source.ids, run.settings.data.poison_ratio)
    return poison


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: a source, and the stages that its batches still need (poison, then purification)."""

    source: Source
    stages: tuple

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Every sample once, in index order and without augmentation, as probes want it."""
        return evaluate_batches(self.source, batch_size=batch_size, device=device, stages=self.stages)


def build_training_set(run: Run, data: OpenData) -> TrainingSet:
    """The training set poisoned and purified as the run says; held in memory, poisoned once, where it fits."""
    train, poison = data.train, build_poison(run, data.train)
    before = tuple(d.before for d in build_defenses(run, data.num_classes))
    if _is_held(run, train):
        return TrainingSet(ResidentSource(train, None if poison is None else poison.apply), before)
    return TrainingSet(train, (() if poison is None else (poison.apply,)) + before)


def build_defenses(run: Run, num_classes: int) -> list[Defense]:
    """The defenses in the order of the config."""
    return [d.cls(d.config, num_classes=num_classes, seed=run.seed) for d in run.defenses]


def build_method(run: Run, num_classes: int, *, initialize: bool = True) -> Method:
    """Encoder, method and defenses around it, with weights drawn from the run's seed; torch's generator is restored.

    initialize: False for a method whose weights are to be loaded, which then needs no file that it first started from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        encoder = build_encoder(run.settings.model)
        method = _viewing(run.method.cls(run.method.config, encoder=encoder, num_classes=num_classes), run.settings)
        for defense in build_defenses(run, num_classes):
            method = defense.wrap(method)
    if initialize:
        method.initialize()
    return method


def _viewing(method: Method, settings: RunConfig) -> Method:
    """The method with as many large views as the run asks for. Raises ConfigError for fewer than it needs."""
    count = settings.views.count
    if count is not None and count < method.num_views:
        raise ConfigError(f"views.count {count}: {method.name} needs {method.num_views} views or more.")
    method.num_views = count or method.num_views
    return method


def build_stream(run: Run, training: TrainingSet, method: Method, device: torch.device) -> ShardStream:
    """The training stream of this rank, with the views that the method asks for."""
    settings = run.settings
    views = Views(settings.views, default=method.default_views, count=method.num_views, seed=run.seed)
    return ShardStream(
        training.source,
        batch_size=settings.data.batch_size,
        seed=run.seed,
        rank=collectives.rank(),
        world=collectives.world_size(),
        workers=settings.data.workers,
        window=settings.data.window,
        stages=(*training.stages, views),
        device=device,
    )


def spread_batch_norm(run: Run, method: Method, device: torch.device) -> Method:
    """The method with batch norm over ranks, where the run asks for it and there are several."""
    if collectives.world_size() > 1 and run.settings.model.batch_norm == "synced":
        return synchronize(method, device)
    return method

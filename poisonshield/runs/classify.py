"""Training of a classifier or an encoder on images: supervised or self-supervised, poisoned, and with defenses."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from poisonshield import collectives
from poisonshield.config import Checker, Choice, Settings
from poisonshield.data import ShardStream, bundled_names
from poisonshield.data.plan import Plan
from poisonshield.data.views import Views, ViewsConfig
from poisonshield.defenses.base import Context
from poisonshield.engine.audit import Epochs, Finding, audit
from poisonshield.engine.checkpoint import sha256, together
from poisonshield.engine.optim import parameter_groups
from poisonshield.engine.processes import choose_device
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError, ConfigError, reason_of
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.base import Number
from poisonshield.evals.pairs import watch_pairs
from poisonshield.evals.parts.numbers import Measured, columns_of, measure, numbers_of
from poisonshield.evals.parts.settings import EvaluateConfig
from poisonshield.files import draft_of, flush, tell_of_disk
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import BackboneConfig, build_encoder, refuse_unknown
from poisonshield.models.batchnorm import synchronize
from poisonshield.poisons.release.recipe import ENDING, read_recipe
from poisonshield.registry import Registry
from poisonshield.reports.plots import plot_run
from poisonshield.reports.tables import list_numbers, over_poisons
from poisonshield.runs.parts.image_data import (
    DataConfig,
    OpenData,
    TrainingSet,
    build_defenses,
    build_training_set,
    open_data,
    open_train,
)
from poisonshield.runs.parts.readouts import write_results
from poisonshield.runs.parts.samples import build_subject
from poisonshield.runs.parts.shards import release
from poisonshield.runs.parts.training import Place, Training, TrainingSettings

log = logging.getLogger(__name__)


class ReleaseConfig(Settings):
    """What `poisonshield poison` writes into the run folder."""

    format: str = Field(
        "both", pattern="^(shards|recipe|both)$", description="shards (lossless), recipe (kilobytes) or both."
    )
    samples_per_shard: int = Field(5000, ge=1, description="Images in one tar.")


class ClassifySettings(TrainingSettings):
    """One experiment on images."""

    renamed: ClassVar[dict[str, str]] = {"forge": "release"}

    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: BackboneConfig = BackboneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    release: ReleaseConfig = ReleaseConfig()


@dataclass(frozen=True)
class Opened:
    """Data and the method of a run before its processes meet."""

    data: OpenData
    training: TrainingSet
    method: SSLMethod


class OneFeature(torch.nn.Identity):
    """An encoder that is quickly built, for checks of what stands around it."""

    feature_dim = 1


class Classify(Training):
    """A run of this kind. poison: a Choice, the path of a recipe file, or None."""

    name: ClassVar[str] = "classify"
    Settings: ClassVar[type[TrainingSettings]] = ClassifySettings
    methods: ClassVar[Registry] = Registry("poisonshield.methods", kind="method")
    defenses_from: ClassVar[tuple[Registry, ...]] = (Registry("poisonshield.defenses", kind="defense"),)
    poisons: ClassVar[Registry] = Registry("poisonshield.poisons", kind="poison")
    identity: ClassVar[tuple[str, ...]] = ("data", "poison", "method", "defense", "seed")
    makes: ClassVar[tuple[str, ...]] = ("evaluation.json", "probes.png", "results.png")
    keeps: ClassVar[tuple[str, ...]] = ("train", f"*{ENDING}")
    places: ClassVar[tuple[str, ...]] = ("data.train", "data.test", "data.poison", "method.init_from")
    changes_after: ClassVar[tuple[str, ...]] = (
        "evaluate.", "data.batch_size", "data.source", "data.workers", "engine.device",
    )  # fmt: skip

    @property
    def poison_label(self) -> str:
        """The poison's name, a recipe's being in its file."""
        return read_recipe(self.poison)[0].name if isinstance(self.poison, Path) else super().poison_label

    def pick_poison(self, checker: Checker, written: Any) -> Any:
        """A poison by name, or the path of a recipe."""
        if not isinstance(written, str) or not ("/" in written or written.endswith(ENDING)):
            return super().pick_poison(checker, written)
        if not Path(written).is_file():
            checker.problem(
                ("data", "poison"),
                f"data.poison: there is no recipe file {written}. Write one with `poisonshield poison`.",
            )
        return Path(written)

    def check_together(self, checker: Checker, settings: ClassifySettings) -> None:
        """Pairs that cannot work together, found by building the whole stack around an empty encoder."""
        if isinstance(self.poison, Path) and settings.data.poison_ratio < 1:
            checker.problem(("data", "poison_ratio"), "data.poison_ratio: a recipe brings its own. Leave it out.")
        method = self._try_stack(checker, settings)
        if method is None:
            return
        try:
            settings.optimizer.check_sharding(settings.engine.zero_stage)
            parameter_groups(method, settings.optimizer)
        except ConfigError as err:
            checker.problem(("optimizer",), str(err))
        if settings.data.batch_size < 2:
            checker.problem(("data", "batch_size"), "data.batch_size: batch norm needs at least 2 samples.")
        try:
            refuse_unknown(settings.model)
        except ConfigError as err:
            checker.problem(("model", "name"), str(err))

    def _try_stack(self, checker: Checker, settings: ClassifySettings) -> SSLMethod | None:
        """Method and defenses around an encoder of one feature, or None with the problem noted. Takes no memory."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                inner = self.method.cls(self.method.config, encoder=OneFeature(), num_classes=2)
                inner = _set_views(inner, settings)
            except ConfigError as err:
                checker.problem(("method",), f"method: {err}")
                return None
            except RuntimeError as err:  # torch's, of sizes that no tensor can have
                checker.problem(
                    ("method",), f"method: no network has such sizes ({reason_of(err)}). Give smaller ones."
                )
                return None
            for i, choice in enumerate(self.defenses):
                try:
                    inner = _try_defense(choice, inner, zero_stage=settings.engine.zero_stage)
                except ConfigError as err:
                    checker.problem(("defenses", i), f"defenses[{i}]: {err}")
                    return None
        return inner

    # Training

    def open(self, folder: RunFolder) -> Opened:
        """Both data sets, verified and poisoned, and the method with the weights that it starts from."""
        data = open_data(self)
        training = build_training_set(self, data)
        starts = not folder.will_load(self.settings.engine.resume)
        return Opened(data, training, build_method(self, data.num_classes, initialize=starts))

    @classmethod
    def names_of_data(cls) -> Sequence[str]:
        """The bundled sets."""
        return bundled_names()

    def digests(self, opened: Opened) -> dict[str, str]:
        """Of both sets, and of a recipe."""
        sets = {"data.train": opened.data.train, "data.test": opened.data.test}
        digests = {name: source.digest for name, source in sets.items() if source is not None}
        return digests | ({"data.poison": sha256(self.poison)} if isinstance(self.poison, Path) else {})

    def run(self, opened: Opened, folder: RunFolder, device: torch.device) -> None:
        """Train, export the weights, and read off what they are worth."""
        data, training = opened.data, opened.training
        method = spread_batch_norm(self, opened.method, device)
        self.announce(f"on {self.settings.data.train}")
        watch = watch_pairs(build_subject(self, data, training, method, device), self.settings.evaluate.watch_pairs)
        trainer = self.trainer(method, build_stream(self, training, method, device), folder, watch)
        done = trainer.fit()
        state = trainer.state_dict()

        def end() -> None:
            with tell_of_disk(folder.path):
                export(self, state, folder)
                values = self.measure(data, training, load_method(self, data, state, device), device)
                write_results(self, data, folder, values, steps=done["steps"], seconds=done["seconds"])
                plot_run(folder)

        together(end, what="measuring and writing results", only_first=True, patient=True)

    def measure(self, data: OpenData, training: TrainingSet, method: SSLMethod, device: torch.device) -> Measured:
        """What each evaluation gives, {name: {key: value}}, None for one that the settings leave out."""
        return measure(build_subject(self, data, training, method, device), self.settings.evaluate, EVALUATIONS)

    def evaluate(self) -> Measured:
        """Accuracies on clean test images, and probes."""
        folder = self.folder
        weights = folder.export / "method.safetensors"
        if not weights.is_file():
            raise CheckpointError(
                f"{folder.path} is not a finished run: it lacks export/{weights.name}.\n"
                "  Train it first, or go on with engine.resume=auto."
            )
        with folder.held():
            data, device = open_data(self), choose_device(self.settings.engine.device)
            method = load_method(self, data, load_file(weights), device)
            opened = Opened(data, build_training_set(self, data), method)
            self.refuse_other_data(folder, opened)
            values = self.measure(data, opened.training, method, device)
            rows = json.loads(folder.results.read_text()) if folder.results.is_file() else []
            old = rows[-1] if rows else {"steps": 0, "seconds": 0.0}
            with tell_of_disk(folder.path):
                write_results(self, data, folder, values, steps=int(old["steps"]), seconds=old["seconds"])
        return values

    def describe(self, values: Measured) -> str:
        """A number a line."""
        return list_numbers(values, EVALUATIONS)

    def write_poison(self) -> Path:
        """Poisoned shards with a measured budget, a recipe, or both."""
        with self.folder.held():
            return release(self)

    def audit(self) -> list[Finding]:
        """Whether each epoch trained on every image of data.train once. Reads and verifies the images' shards."""
        folder, train, data = self.folder, open_train(self), self.settings.data
        folder.digests = {"data.train": train.digest}
        folder.refuse_other_data()
        plan = Plan(train.ids, train.shard, batch_size=data.batch_size, seed=self.seed, window=data.window)

        def first(epoch: int, count: int) -> torch.Tensor:
            return torch.cat([plan.batch(epoch, step) for step in range(count)])

        return audit(folder, Epochs(train.keys, plan.sizes, first, ended=itemgetter("epoch")))

    # Results

    @classmethod
    def columns(cls, rows: Sequence[Mapping[str, Any]]) -> tuple[Number, ...]:
        """Accuracies."""
        return columns_of(numbers_of(EVALUATIONS), rows)

    @classmethod
    def flatten(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The last row alone: a run has one."""
        return rows[-1:]

    @classmethod
    def summarize(cls, places: Sequence[Place]) -> str:
        """Lowest and mean accuracy over the poisons of an axis `poison`."""
        return over_poisons([(place.labels, place.rows) for place in places])


def _try_defense(choice: Choice, method: SSLMethod, *, zero_stage: int) -> SSLMethod:
    """The method inside this defense. Raises ConfigError where they do not go together, or not with sharded weights."""
    defense = choice.cls(choice.config, Context(num_classes=2))
    if zero_stage == 3 and not defense.ranks_stay_in_step:
        raise ConfigError(
            f"with engine.zero_stage: 3 every forward pass gathers weights, and these settings of {choice.name} let "
            "each rank stop its attack by itself. Use zero_stage 2 or less, or all steps for all."
        )
    return defense.wrap(method)


def build_method(run: Classify, num_classes: int, *, initialize: bool = True) -> SSLMethod:
    """Encoder, method and defenses around it, with weights drawn from the run's seed; torch's generator is restored.

    initialize: False for a method whose weights are to be loaded, which then needs no file that it first started from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        encoder = build_encoder(run.settings.model)
        method = _set_views(run.method.cls(run.method.config, encoder=encoder, num_classes=num_classes), run.settings)
        for defense in build_defenses(run, num_classes):
            method = defense.wrap(method)
    if initialize:
        method.initialize()
    return method


def load_method(run: Classify, data: OpenData, state: dict[str, torch.Tensor], device: torch.device) -> SSLMethod:
    """The run's method on one device with the given weights, whatever trained and sharded them."""
    method = build_method(run, data.num_classes, initialize=False)
    method.load_state_dict(state)
    return method.to(device).to(memory_format=torch.channels_last).eval()


def _set_views(method: SSLMethod, settings: ClassifySettings) -> SSLMethod:
    """The method with as many large views as the run asks for. Raises ConfigError for fewer than it needs."""
    count = settings.views.count
    if count is not None and count < method.num_views:
        raise ConfigError(f"views.count {count}: {method.name} needs {method.num_views} views or more.")
    method.num_views = count or method.num_views
    return method


def build_stream(run: Classify, training: TrainingSet, method: SSLMethod, device: torch.device) -> ShardStream:
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
        lanes=settings.data.lanes,
        stages=(*training.stages, views),
        device=device,
        keep_bytes=not training.stages,  # views take bytes; whole images as floats are four times as much to move
    )


def spread_batch_norm(run: Classify, method: SSLMethod, device: torch.device) -> SSLMethod:
    """The method with batch norm over ranks, where the run asks for it and there are several."""
    if collectives.world_size() > 1 and run.settings.model.batch_norm == "synced":
        return cast(SSLMethod, synchronize(method, device))  # the same module with other norms in it
    return method


def export(run: Classify, state: dict[str, torch.Tensor], folder: RunFolder) -> None:
    """Write `export/method.safetensors` (everything) and `export/backbone.safetensors` (timm's own names)."""
    folder.export.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in state.items()}
    metadata = {"format": "pt", "model": json.dumps(run.record["model"])}
    _save(state, folder.export / "method.safetensors", metadata)
    marker = "encoder.backbone."
    backbone = {k[k.index(marker) + len(marker) :]: v.clone() for k, v in state.items() if marker in k}
    _save(backbone, folder.export / "backbone.safetensors", metadata)


def _save(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all."""
    draft = draft_of(path)
    try:
        save_file(state, draft, metadata=metadata)
        flush(draft)
        os.replace(draft, path)
    except SafetensorError as err:
        number = re.search(r"os error (\d+)", str(err))
        raise OSError(int(number[1]) if number else 0, str(err)) from err
    finally:
        draft.unlink(missing_ok=True)

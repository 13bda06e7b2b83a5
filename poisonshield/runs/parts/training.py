"""An experiment that trains one method on data that may be poisoned and defended: what both halves share."""

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from poisonshield.batch import Stream
from poisonshield.config import Checker, Choice, Tree, dump
from poisonshield.config.describe import Notes, notes_of
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import met, processes, refuse_missing
from poisonshield.engine.runfolder import RunFolder, flatten
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.settings import backends
from poisonshield.engine.trainer import Trainer
from poisonshield.errors import ConfigError
from poisonshield.evals.base import Number
from poisonshield.method import Method
from poisonshield.registry import Registry
from poisonshield.runs.base import Experiment, ExperimentSettings

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has none

log = logging.getLogger(__name__)

OF_A_PROCESS = ("engine.device", "engine.threads", "data.workers")
"""Settings that may differ between the processes of a run."""


@dataclass(frozen=True)
class Place:
    """A place of a grid: its label on each axis, and the rows of results of its runs, all seeds together."""

    labels: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)


class TrainingSettings(ExperimentSettings):
    """What every experiment has that trains one method on data that may be poisoned and defended."""

    method: Any = Field(description="A method's name, or a block with `name:` and its settings.")
    defenses: Any = Field((), description="A list of defenses, each a block with `name:`, applied in this order.")
    optimizer: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()


class Training(Experiment):
    """An experiment that trains one method: what both halves of the project share. Its results are rows."""

    Settings: ClassVar[type[TrainingSettings]]
    """The whole config."""
    methods: ClassVar[Registry]
    defenses_from: ClassVar[tuple[Registry, ...]]
    poisons: ClassVar[Registry]
    """Where `method`, `defenses` and `data.poison` pick from."""
    identity: ClassVar[tuple[str, ...]]
    """Keys by which a row of results is known: another one with the same values takes its place."""
    scales_rate: ClassVar[bool] = True
    """Whether the learning rate may be written for a batch of 256."""
    makes: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ()
    """What a run leaves in its folder beside what the engine does, and what may lie there before it: see RunFolder."""
    places: ClassVar[tuple[str, ...]] = ()
    """Settings that say where data lies: the record keeps absolute paths, and data may move as long as it is the same.
    One that ends with * stands for all settings there."""

    settings: Any
    method: Choice
    defenses: tuple[Choice, ...]
    poison: Any
    poisons_other_data: bool = False
    """Whether data.train was changed, by a child file or an override, and the poison that stood with it was not."""

    @classmethod
    def recognizes(cls, values: Mapping[str, Any]) -> bool:
        """By the method's name."""
        method = values.get("method")
        return (method.get("name") if isinstance(method, dict) else method) in cls.method_names()

    @classmethod
    def method_names(cls) -> list[str]:
        """The methods of this half."""
        return cls.methods.names()

    # Reading

    def read(self, tree: Tree) -> None:
        """Settings, method, defenses and poison, each checked, and together."""
        checker, values = Checker(tree), tree.values
        settings = checker.settings(self.Settings, (), values, owner="a run")
        method = checker.choice((self.methods,), ("method",), values.get("method"))
        blocks = values.get("defenses") or []
        if not isinstance(blocks, list):
            checker.problem(
                ("defenses",), "defenses: a list is wanted, one `- name: ...` entry per defense (or [] for none)."
            )
            blocks = []
        picked = [self.pick_defense(checker, ("defenses", i), block) for i, block in enumerate(blocks)]
        defenses = tuple(d for d in picked if d is not None)
        data = values.get("data")
        written = data.get("poison") if isinstance(data, dict) else None
        self.poison = None if written is None else self.pick_poison(checker, written)
        self.poisons_other_data = written is not None and tree.is_later(("data", "train"), ("data", "poison"))
        if settings is not None and method is not None and len(defenses) == len(picked):
            self.method, self.defenses = method, defenses
            self.check_together(checker, settings)
        checker.finish()
        self.record = dump(settings, values)
        self.record["method"] = _record(self.method, values["method"])
        self.record["defenses"] = [_record(d, b) for d, b in zip(self.defenses, blocks, strict=True)]
        if isinstance(self.poison, Choice):
            self.record["data"]["poison"] = _record(self.poison, written)
        for place in self.places:
            _make_absolute(self.record, place.split("."), self.names_of_data())
        # The record keeps lr as written; from here on it is the peak.
        peak = settings.optimizer.for_batch(settings.data.batch_size) if self.scales_rate else settings.optimizer
        self.settings = settings.model_copy(update={"optimizer": peak})

    def pick_defense(self, checker: Checker, path: tuple, block: Any) -> Choice | None:
        """The defense of a block, or None with the problem noted."""
        return checker.choice(self.defenses_from, path, block)

    def pick_poison(self, checker: Checker, written: Any) -> Any:
        """The poison of `data.poison`, or None with the problem noted."""
        return checker.choice((self.poisons,), ("data", "poison"), written)

    @abstractmethod
    def check_together(self, checker: Checker, settings: Any) -> None:
        """Note what does not fit together. self.method, self.defenses and self.poison are set."""

    # What it is called

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
        return "+".join(d.cls(d.config).label for d in self.defenses) or "none"

    # Training

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        run = self.settings.run
        return RunFolder(
            run.dir,
            overwrite=run.overwrite,
            makes=self.makes,
            keeps=self.keeps,
            harmless=("evaluate.", "generate.", "data.workers", "data.verify", "data.cache", "data.bad_samples"),
            places=self.places,
        )

    def train(self) -> Path:
        """The run folder of a finished run. Config and data are checked before any process group starts.

        Raises BusyError if another process works in the folder, which it does before any data is opened where the run
        is of one process.
        """
        with met(self.settings.engine):
            return self._train()

    def _train(self) -> Path:
        engine, folder = self.settings.engine, self.folder
        self.refuse_planting()
        folder.check(self.record, resume=engine.resume)
        refuse_missing(engine)
        with folder.held():
            opened = self.open(folder)
            folder.digests = self.digests(opened)
            folder.check(self.record, resume=engine.resume)
            with processes(engine, seed=self.seed, facts=self.facts(folder)) as device, folder.held():
                self.run(opened, folder, device)
        return folder.path

    def facts(self, folder: RunFolder) -> dict[str, Any]:
        """What all ranks must have in common: the settings that are not a process's own, and the digests of the data,
        which may lie elsewhere on each host. The folder has its digests."""
        own = (*OF_A_PROCESS, *folder.digests)
        record = {name: value for name, value in flatten(self.record) if not any(fnmatch(name, o) for o in own)}
        return record | {f"digest of {place}": digest for place, digest in folder.digests.items()}

    def refuse_planting(self) -> None:
        """Raise ConfigError if training would poison data that the poison was not written for, and nobody said so."""
        if not self.poisons_other_data:
            return
        data = self.settings.data.train
        raise ConfigError(
            f"data.train={data}: {self.origin} was written for other images, and its poison {self.poison_label} would "
            "be planted into these.\n  To train on them as they are: data.poison=null. To poison them on purpose, say "
            f"so: data.poison={self.poison if isinstance(self.poison, Path) else self.poison_label}."
        )

    @abstractmethod
    def open(self, folder: RunFolder) -> Any:
        """What training needs of data and models, opened and checked; given to `run`."""

    @classmethod
    def names_of_data(cls) -> Sequence[str]:
        """What stands at a place and is no path, as it comes with the package."""
        return ()

    @abstractmethod
    def digests(self, opened: Any) -> dict[str, str]:
        """By place, a digest of what lies there. opened: what `open` gave."""

    def refuse_changes(self, overrides: Sequence[str]) -> None:
        """Those of what a finished run was trained with; where its data lies may change if its digest is known."""
        super().refuse_changes([text for text in overrides if not self._tells_where_data_lies(text)])

    def _tells_where_data_lies(self, override: str) -> bool:
        """Whether it is a place with something there, which can be held to the digest that the run wrote down."""
        place, _, path = override.partition("=")
        return place in self.places and Path(path).exists() and self.folder.wrote_digest(place)

    def refuse_other_data(self, folder: RunFolder, opened: Any) -> None:
        """Raise ConfigError if the finished run in the folder had other data than is opened now."""
        folder.digests = self.digests(opened)
        folder.refuse_other_data()

    @abstractmethod
    def run(self, opened: Any, folder: RunFolder, device: torch.device) -> None:
        """Build method and stream, fit, and write exports, rows and figures. Every rank calls."""

    def trainer(
        self,
        method: Method,
        stream: Stream,
        folder: RunFolder,
        watch: Callable[[], Mapping[str, float | None]] | None = None,
    ) -> Trainer:
        """What trains the method on the stream as this experiment says."""
        s = self.settings
        return Trainer(
            method, stream, s.engine, optimizer=s.optimizer, schedule=s.schedule, run_folder=folder, seed=self.seed,
            fixed_record=self.record, watch=watch,
        )  # fmt: skip

    def announce(self, what: str) -> None:
        """One line before the first step."""
        names = f"poison {self.poison_label}, defense {self.defense_label}"
        log.info("%s: %s %s, %s", self.origin, self.method.name, what, names)

    def notes(self) -> Notes:
        """Those of the settings, and of what they pick."""
        notes = notes_of(self.settings)
        words, data = notes["data"]
        data = {**data, "poison": (data["poison"][0], notes_of(self.poison))}
        return {
            **notes,
            "data": (words, data),
            "method": (notes["method"][0], notes_of(self.method)),
            "defenses": (notes["defenses"][0], notes_of(self.defenses)),
        }

    def describe_config(self) -> str:
        """The config, and what the backend gets. Raises ConfigError if it could not be trained so."""
        self.refuse_planting()
        backend: type[Backend] = backends.get(self.settings.engine.backend)
        derived = backend.derived(self.settings.engine, self.settings.optimizer)
        return super().describe_config() + (f"\n\n{derived}" if derived else "")

    # Results

    @classmethod
    @abstractmethod
    def columns(cls, rows: Sequence[Mapping[str, Any]]) -> tuple[Number, ...]:
        """Which numbers of these rows tables show."""

    @classmethod
    def places_in_rows(cls) -> tuple[str, ...]:
        """Keys of a row that say what it is of, where a run has several rows."""
        return ()

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of results.json, flat; none while it has not finished. Raises if the folder is another run's."""
        folder = self.folder
        if not folder.results.is_file():
            return []
        folder.check(self.record, resume="auto")
        return self.flatten(json.loads(folder.results.read_text()))

    @classmethod
    @abstractmethod
    def flatten(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of results.json as tables want them."""

    @classmethod
    def compare(cls, runs: Sequence[tuple[Mapping[str, str], "Self", list[dict[str, Any]]]]) -> None:
        """Write into the rows of a grid's runs (labels, run, rows) what only their comparison tells."""

    @classmethod
    def summarize(cls, places: Sequence[Place]) -> str:
        """Tables over the places of a grid, beside the one of all places; "" for none."""
        return ""

    @classmethod
    def draw(cls, path: Path, runs: Iterable[tuple[Mapping[str, str], Path]]) -> None:
        """A picture of a grid's runs, where there is anything to see."""


def _make_absolute(record: dict[str, Any], names: Sequence[str], no_paths: Sequence[str]) -> None:
    """Write the paths at these keys as seen from the root, if they are of this machine's."""
    *blocks, last = names
    for name in blocks:
        record = record.get(name) or {}
    for key in record if last == "*" else [last]:
        value = record.get(key)
        if isinstance(value, str) and value not in no_paths and Path(value).exists():
            record[key] = str(Path(value).absolute())


def _record(choice: Choice, block: Any) -> dict[str, Any]:
    return {"name": choice.name, **dump(choice.config, block if isinstance(block, dict) else {})}

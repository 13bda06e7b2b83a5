"""What an experiment is: one protocol that every command uses without asking which kind it has.

A config file is read into an Experiment of the kind that recognizes it (one file a kind beside this one, found by
scanning), and checked in all its parts before anything starts. Then it trains, or poisons, or is evaluated again from
its run folder; its results are rows with columns that it names itself.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from poisonshield.config import Settings, Tree, find_config, load_tree
from poisonshield.config.describe import Notes, describe_yaml, notes_of
from poisonshield.config.tree import override
from poisonshield.engine.audit import Finding
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import CheckpointError, ConfigError, RenamedSettings
from poisonshield.files import tell_of_long_names
from poisonshield.registry import Registry, suggest

KINDS = Registry("poisonshield.runs", kind="kind of experiment")

Overrides = Sequence[str]


class RunSection(Settings):
    """Where a run's results go."""

    dir: str = Field(description="The run folder.")
    overwrite: bool = Field(False, description="Replace what another run left there.")


class ExperimentSettings(Settings):
    """What the config of every experiment that trains has."""

    seed: int = Field(0, ge=0, description="Of data order, weights, poison and every other draw.")
    run: RunSection
    engine: EngineConfig


class Experiment(ABC):
    """A checked config. Built as `SomeKind(tree, origin)`, which raises one ConfigError that lists every problem."""

    name: ClassVar[str]
    """Of the kind, which is its file's."""
    changes_after: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the settings that may change when a finished run is evaluated again."""
    asked_first: ClassVar[bool] = False
    """Whether a config with its keys is of this kind whatever else it holds."""
    settings: Any
    record: dict[str, Any]
    """The config with every setting, plain values, as it is written down."""

    @classmethod
    @abstractmethod
    def recognizes(cls, values: Mapping[str, Any]) -> bool:
        """Whether a config with these keys is of this kind."""

    @classmethod
    def method_names(cls) -> list[str]:
        """What `method.name` may be in this kind."""
        return []

    def __init__(self, tree: Tree, origin: Path) -> None:
        self.origin = origin
        self.read(tree)

    @abstractmethod
    def read(self, tree: Tree) -> None:
        """Fill settings and record. Raises ConfigError."""

    @abstractmethod
    def train(self) -> Path:
        """The folder of the finished experiment.

        Raises ConfigError, DataError, CheckpointError; Preempted (exit code 75) if told to stop, after saving.
        """

    def evaluate(self) -> Any:
        """The numbers of the finished run in this experiment's folder, measured anew and written down."""
        raise ConfigError(f"{self.origin}: a {self.name} has no results of its own to measure again.")

    def describe(self, values: Any) -> str:
        """What `evaluate` returned, for people."""
        return str(values)

    def write_poison(self) -> Path:
        """The folder with what the config's poison makes of its data."""
        raise ConfigError(f"{self.origin} is a {self.name}, which poisons nothing. Give a config with data.poison.")

    def audit(self) -> list[Finding]:
        """What each epoch of the run in this experiment's folder trained on, held against its data."""
        raise ConfigError(
            f"{self.origin}: a {self.name} has no epochs over a data set. Give a run that trained on images."
        )

    def refuse_changes(self, overrides: Overrides) -> None:
        """Raise ConfigError for overrides of what a finished run was trained with."""
        for text in overrides:
            if not text.startswith(self.changes_after):
                may = ", ".join(self.changes_after)
                raise ConfigError(f"{text}: a finished run keeps what it was trained with. {may} may change.")

    def train_part(self, part: str) -> Path:
        """Trains a part of the experiment, such as 2/4. Raises ConfigError for one that has no parts."""
        raise ConfigError(f"{self.origin} is a {self.name}, and only a grid has parts (`blocks:`). Leave --part out.")

    def table(self) -> str:
        """What is done of an experiment of several runs. Raises ConfigError for one that is no such."""
        raise ConfigError(f"{self.origin} is a {self.name}, and only a grid (`blocks:`) has a table of runs.")

    def describe_config(self) -> str:
        """The config as YAML, defaults filled in and each setting with its words, and what the backend makes of it."""
        return describe_yaml(json.loads(json.dumps(self.record)), self.notes())

    def notes(self) -> Notes:
        """The words of the settings, for describe_yaml."""
        return notes_of(self.settings)


@tell_of_long_names()
def read_experiment(config: str | Path, overrides: Overrides = ()) -> Experiment:
    """The checked experiment of a config file (a path, or the name of a shipped one) and its overrides.

    Touches no process group, data or network. Raises ConfigError with every problem and its line.
    """
    return build_experiment(load_tree(config, overrides), find_config(config))


def build_experiment(tree: Tree, origin: Path) -> Experiment:
    """The same of settings that are read already. origin: the file that messages name."""
    found: list[type[Experiment]] = [KINDS.get(name) for name in KINDS.names()]
    kinds = sorted(found, key=lambda kind: not kind.asked_first)
    for kind in kinds:
        if kind.recognizes(tree.values):
            return kind(tree, origin)
    method = tree.values.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    known = sorted(known for kind in kinds for known in kind.method_names())
    if name is None:
        raise ConfigError(
            f"{origin} names no method, and is no grid or pipeline either. Set method.name: {', '.join(known)}."
        )
    raise ConfigError(
        f"{tree.where(('method', 'name'))}: method.name: {name!r} is not a method.{suggest(str(name), known)}  "
        f"Known: {', '.join(known)}"
    )


def read_finished(folder: str | Path, overrides: Overrides = ()) -> Experiment:
    """The experiment of a run folder, with changes of how it is read.

    Raises CheckpointError if there is no run, ConfigError for an override of what was trained.
    """
    config = RunFolder(folder).config
    if not config.is_file():
        raise CheckpointError(
            f"{folder} is not a finished run: it lacks {config.name}.\n"
            "  Train it first, or go on with engine.resume=auto."
        )
    tree = _modern_tree(config)
    override(tree, f"run.dir={json.dumps(str(folder))}")  # it may have been moved since it was trained
    build_experiment(tree, config).refuse_changes(overrides)
    for text in overrides:
        override(tree, text)
    return build_experiment(tree, config)


def _modern_tree(config: Path) -> Tree:
    """The record that a run wrote, with settings of an earlier version under their new names.

    How that version evaluated is left out: evaluations have other settings now, and nothing was trained with them.
    So is what has moved into the block of an option that was named and has no settings, such as `mask: file`.
    """
    tree = load_tree(config)
    for _ in range(len(tree.marks)):
        try:
            build_experiment(tree, config)
        except RenamedSettings as err:
            for path, name in err.moves:
                value, block = _take(tree.values, path), _find(tree.values, name.split(".")[:-1])
                if path[0] != "evaluate" and not isinstance(block, str):
                    override(tree, f"{name}={json.dumps(value)}")
        else:
            break
    return tree


def _take(values: Any, path: tuple) -> Any:
    """The value at a path, which is then not there any more."""
    *blocks, last = path
    for part in blocks:
        values = values[part]
    return values.pop(last)


def _find(values: Any, names: Sequence[str]) -> Any:
    """The value at a path of keys and numbers, None if there is none."""
    for name in names:
        values = (
            values[int(name)] if isinstance(values, list) else values.get(name) if isinstance(values, dict) else None
        )
    return values

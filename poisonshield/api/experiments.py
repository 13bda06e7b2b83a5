"""Experiments from Python: a config file, by path or by the name of a shipped one, and what is to be done with it.

folder = train("defend/vespr_cifar10_mini", ["seed=1", "run.dir=runs/try"])
print(evaluate(folder))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poisonshield.files import tell_of_long_names
from poisonshield.runs import read_experiment, read_finished


@tell_of_long_names()
def train(config: str | Path, overrides: Sequence[str] = (), *, part: str = "1/1") -> Path:
    """The folder of a finished experiment of any kind. Everything is checked before any process group starts.

    overrides: `key.path=value`. part: of a grid, which of how many, such as 2/4.
    Raises ConfigError, DataError, CheckpointError; Preempted (exit code 75) if told to stop, after saving.
    """
    experiment = read_experiment(config, overrides)
    return experiment.train() if part == "1/1" else experiment.train_part(part)


def evaluate(folder: str | Path, overrides: Sequence[str] = ()) -> Any:
    """A finished run's numbers, measured again and written into its folder.

    A classifier's by name, or a row for each word. Raises CheckpointError if the run has not finished, ConfigError for
    an override of what was trained.
    """
    return read_finished(folder, overrides).evaluate()


def poison(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """The folder with what the config's poison makes of its data. Raises ConfigError if it names none."""
    return read_experiment(config, overrides).write_poison()


def resolve_config(config: str | Path, overrides: Sequence[str] = ()) -> str:
    """The checked settings as YAML, defaults filled in, and what the engine's backend derives from them."""
    return read_experiment(config, overrides).describe_config()


def grid_table(config: str | Path, overrides: Sequence[str] = ()) -> str:
    """The table of what a grid has done so far; trains nothing."""
    return read_experiment(config, overrides).table()

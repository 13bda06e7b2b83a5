"""What a run leaves behind, and whose folder it is.

config.yaml    resolved settings      checkpoints/   see checkpoint.py
metrics.jsonl  one line an interval   export/        weights for timm, torchvision, diffusers
results.json   rows of the table      tensorboard/   if asked for
validation/    pictures made while a word is learned
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from poisonshield.engine.checkpoint import write_whole
from poisonshield.errors import ConfigError

log = logging.getLogger(__name__)

_WHICH_RUN = ("data", "poison", "method", "defense", "seed")
RESULT_KEYS = (*_WHICH_RUN, "test_top1", "knn_top1", "linear_top1", "steps", "seconds")
_HOW_TO_START = ("run.dir", "run.overwrite", "engine.resume")


class RunFolder:
    """One run's folder. Only rank 0 writes; `check` reads and may be called by anyone, before any process group."""

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.results, self.checkpoints = self.path / "results.json", self.path / "checkpoints"
        self.export, self.tensorboard = self.path / "export", self.path / "tensorboard"
        self.validation = self.path / "validation"

    def check(self, record: Mapping[str, Any], *, resume: str | bool) -> bool:
        """True if the run must start from an empty folder, False if it may go on. Changes nothing.

        Raises ConfigError if the folder holds a run with other settings: any other without resume, any outside `engine`
        and `run` with resume=auto; and, without resume, if it holds checkpoints or results, which a new start would
        lose. An explicit checkpoint path and overwrite are taken at their word.
        """
        changed = self._changes(record)
        if self.overwrite:
            return resume is False or bool(changed)
        serious = changed if resume is False else [c for c in changed if not c.startswith(("engine.", "run."))]
        if serious and resume in (False, "auto"):
            raise ConfigError(
                f"{self.path} holds a run with other settings: {', '.join(serious)}.\n"
                "  Choose another run.dir, put the settings back, or discard that run with run.overwrite=true."
            )
        if resume is False and (self.results.exists() or any(self.checkpoints.glob("step-*"))):
            raise ConfigError(
                f"{self.path} holds a run of these settings already.\n"
                "  Go on with engine.resume=auto, choose another run.dir, or discard it with run.overwrite=true."
            )
        if changed:
            log.warning("Going on in %s with changed settings: %s.", self.path, ", ".join(changed))
        return resume is False

    def will_load(self, resume: str | bool) -> bool:
        """Whether a run that starts so takes its weights from a checkpoint."""
        return resume not in (False, "auto") or (resume == "auto" and any(self.checkpoints.glob("step-*")))

    def claim(self, record: Mapping[str, Any], *, resume: str | bool) -> None:
        """Make the folder this run's: check, empty it if the run starts anew, write config.yaml. Rank 0 only."""
        if self.check(record, resume=resume):
            self._empty()
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(_plain(record), sort_keys=False))

    def add_result(self, row: Mapping[str, Any]) -> None:
        """Add a row to results.json, in place of an earlier one of the same data, poison, method, defense and seed."""
        if set(row) != set(RESULT_KEYS):
            raise ConfigError(f"a result row has the keys {', '.join(RESULT_KEYS)}; this one has {', '.join(row)}.")
        rows = json.loads(self.results.read_text()) if self.results.exists() else []
        rows = [r for r in rows if any(r[k] != row[k] for k in _WHICH_RUN)]
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.results, json.dumps([*rows, {k: row[k] for k in RESULT_KEYS}], indent=1))

    def _changes(self, record: Mapping[str, Any]) -> list[str]:
        if not self.config.exists():
            return []
        try:
            old = dict(_flat(yaml.safe_load(self.config.read_text()) or {}))
        except (yaml.YAMLError, AttributeError) as err:
            raise ConfigError(f"{self.config} is not readable as a run's settings: {err}") from err
        new = dict(_flat(_plain(record)))
        keys = [*new, *(k for k in old if k not in new)]
        # A setting that is null is as good as absent, so that one that came with a later version changes no older run.
        return [k for k in keys if k not in _HOW_TO_START and old.get(k) != new.get(k)]

    def _empty(self) -> None:
        for folder in (self.checkpoints, self.export, self.tensorboard, self.validation):
            if folder.is_dir():
                log.warning("Starting anew: removing %s.", folder)
                shutil.rmtree(folder)
        for file in (self.metrics, self.results):
            file.unlink(missing_ok=True)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as YAML gives it back: tuples are lists, paths are strings."""
    return json.loads(json.dumps(record, default=str))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.0", leaf) for each leaf; an empty dict or list is a leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)) or not value:
        yield prefix, value
    for key, item in items:
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))

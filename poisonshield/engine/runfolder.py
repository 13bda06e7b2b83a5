"""What a run leaves behind, and whose folder it is.

config.yaml    resolved settings      checkpoints/        see checkpoint.py
metrics.jsonl  one line an interval   export/             weights for timm, torchvision, diffusers
results.json   rows of the table      tensorboard/        if asked for
                                      .poisonshield.json  names that runs have made here

Only names on that list are ever removed, and a folder with neither the list nor a run's config.yaml is another's.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from poisonshield.errors import ConfigError
from poisonshield.files import write_whole

log = logging.getLogger(__name__)

_HOW_TO_START = ("run.dir", "run.overwrite", "engine.resume")
_EVERY_RUN_MAKES = ("checkpoints", "export", "tensorboard", "metrics.jsonl", "results.json")
_MADE_BEFORE_LISTS = (*_EVERY_RUN_MAKES, "validation")  # what a run may have made that wrote no list yet


class RunFolder:
    """One run's folder. Only rank 0 writes; `check` reads and may be called by anyone, before any process group.

    makes: names of what the experiment puts there beside what every run makes; a new start removes them.
    keeps: names, or patterns such as `*.safetensors`, that may lie there before there is a run, such as a poisoned set:
    a folder of nothing else is free. They are not removed.
    harmless: beginnings of settings that do not change what is trained, so that a run goes on whatever they are.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        makes: Sequence[str] = (),
        keeps: Sequence[str] = (),
        harmless: Sequence[str] = (),
    ) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self.harmless = ("engine.", "run.", *harmless)
        self.makes, self.keeps = (*_EVERY_RUN_MAKES, *makes), tuple(keeps)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.results, self.checkpoints = self.path / "results.json", self.path / "checkpoints"
        self.export, self.tensorboard = self.path / "export", self.path / "tensorboard"
        self.list = self.path / ".poisonshield.json"

    def check(self, record: Mapping[str, Any], *, resume: str | bool) -> bool:
        """True if the run must start from an empty folder, False if it may go on. Changes nothing.

        Raises ConfigError if the folder holds a run with other settings: any other without resume, any outside `engine`
        and `run` with resume=auto; and, without resume, if it holds checkpoints or results, which a new start would
        lose. An explicit checkpoint path and overwrite are taken at their word. Raises it in any case if the folder
        holds something, and no run.
        """
        self._refuse_a_folder_of_others()
        changed = self._find_changes(record)
        if self.overwrite:
            return resume is False or bool(changed)
        serious = changed if resume is False else [c for c in changed if not c.startswith(self.harmless)]
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
        self.mark()
        write_whole(self.config, yaml.safe_dump(_make_plain(record), sort_keys=False))

    def mark(self) -> None:
        """Write down which names runs make here; from then on the folder counts as a run's. Rank 0 only.

        `claim` does it. An experiment that puts something there before its trainer claims the folder marks it first.
        Raises ConfigError if the folder holds something, and no run.
        """
        self._refuse_a_folder_of_others()
        self.path.mkdir(parents=True, exist_ok=True)
        made = sorted({*self._list_made(), *self.makes})
        write_whole(self.list, json.dumps({"made": made}, indent=1))

    def add_result(self, row: Mapping[str, Any], *, identity: Sequence[str]) -> None:
        """Add a row to results.json, in place of an earlier one with the same values under the keys of `identity`."""
        if missing := [key for key in identity if key not in row]:
            raise ConfigError(f"a result row is known by {', '.join(identity)}; this one has no {', '.join(missing)}.")
        rows = json.loads(self.results.read_text()) if self.results.exists() else []
        rows = [r for r in rows if any(r.get(key) != row[key] for key in identity)]
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.results, json.dumps([*rows, dict(row)], indent=1))

    def _refuse_a_folder_of_others(self) -> None:
        if not self.path.is_dir() or self._list_made():
            return
        names = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        others = [name for name in names if not any(fnmatch(name, pattern) for pattern in self.keeps)]
        if others:
            some = ", ".join([*others[:4], "..."] if len(others) > 4 else others)
            raise ConfigError(
                f"{self.path} holds no run, but other things: {some}.\n"
                "  A run starts in a folder that is new, empty or an earlier run's. Choose another run.dir, or move "
                "them away; run.overwrite=true does not touch them."
            )

    def _list_made(self) -> tuple[str, ...]:
        """Names that runs have made in this folder: those on the list, or what a run made that wrote none yet."""
        if not self.list.exists():
            old = dict(_flatten(self._read_old_record())) if self.config.exists() else {}
            return _MADE_BEFORE_LISTS if "run.dir" in old and any(key.startswith("engine.") for key in old) else ()
        try:
            made = json.loads(self.list.read_text())["made"]
            if not isinstance(made, list) or not made or any(n in ("", "..") or n != Path(n).name for n in made):
                raise ValueError(f"{made} is not a list of names of what lies in this folder")
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"{self.list} is not readable as names that runs have made: {err}.\n"
                "  Choose another run.dir, or remove that file and what the run left."
            ) from err
        return tuple(made)

    def _read_old_record(self) -> Any:
        try:
            return yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise ConfigError(f"{self.config} is not readable as a run's settings: {err}") from err

    def _find_changes(self, record: Mapping[str, Any]) -> list[str]:
        if not self.config.exists():
            return []
        old = dict(_flatten(self._read_old_record() or {}))
        new = dict(_flatten(_make_plain(record)))
        keys = [*new, *(k for k in old if k not in new)]
        # A setting that is null is as good as absent, so that one that came with a later version changes no older run.
        return [k for k in keys if k not in _HOW_TO_START and old.get(k) != new.get(k)]

    def _empty(self) -> None:
        for path in (self.path / name for name in self._list_made()):
            if path.is_dir():
                log.warning("Starting anew: removing %s.", path)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _make_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as YAML gives it back: tuples are lists, paths are strings."""
    return json.loads(json.dumps(record, default=str))


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.0", leaf) for each leaf; an empty dict or list is a leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)) or not value:
        yield prefix, value
    for key, item in items:
        yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))

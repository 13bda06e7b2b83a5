"""What a run leaves behind, and whose folder it is.

config.yaml    resolved settings      checkpoints/        see checkpoint.py
metrics.jsonl  one line an interval   export/             weights for timm, torchvision, diffusers
results.json   rows of the table      tensorboard/        if asked for
                                      .poisonshield.json  names that runs have made here
                                      .poisonshield.data.json  digests of the run's data, by the setting that names it

Only names on that list are ever removed, and in folders of such names only the kinds of files that runs write. A folder
with neither the list nor a run's config.yaml is another's.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from poisonshield import collectives
from poisonshield.config.reading import read_file
from poisonshield.engine.checkpoint import ASIDE, PREFIX, together
from poisonshield.errors import BusyError, ConfigError
from poisonshield.files import Lock, tell_of_disk, write_whole

log = logging.getLogger(__name__)

_HOW_TO_START = ("run.dir", "run.overwrite", "engine.resume")
_EVERY_RUN_MAKES = ("checkpoints", "export", "tensorboard", "metrics.jsonl", "results.json")
_PICTURES = ("*.png", "*/*.png", "*.json", "*/*.json")
_KINDS = {
    "checkpoints": (f"{PREFIX}[0-9]*", f"{ASIDE}{PREFIX}[0-9]*", f".{PREFIX}*.tmp"),
    "export": ("*.safetensors", "*/*.safetensors", "*.json", "*/*.json", "*/*.txt"),
    "tensorboard": ("events.out.tfevents.*",),
}
"""What runs write into a folder of theirs, as patterns; into those that are not named here, pictures."""
_MADE_BEFORE_LISTS = (*_EVERY_RUN_MAKES, "validation")  # what a run may have made that wrote no list yet


class RunFolder:
    """One run's folder. Only rank 0 writes; `check` reads and may be called by anyone, before any process group.

    makes: names of what the experiment puts there beside what every run makes; a new start removes them.
    keeps: names, or patterns such as `*.safetensors`, that may lie there before there is a run, such as a poisoned set:
    a folder of nothing else is free. They are not removed.
    harmless: beginnings of settings that do not change what is trained, so that a run goes on whatever they are.
    places: settings that say where data lies. A run goes on with data that lies elsewhere if its digest is the same;
    whoever has opened the data sets `digests`, by setting.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        makes: Sequence[str] = (),
        keeps: Sequence[str] = (),
        harmless: Sequence[str] = (),
        places: Sequence[str] = (),
    ) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self.places, self.digests = tuple(places), dict[str, str]()
        self.harmless = ("engine.", "run.", *harmless)
        self.makes, self.keeps = (*_EVERY_RUN_MAKES, *makes), tuple(keeps)
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.results, self.checkpoints = self.path / "results.json", self.path / "checkpoints"
        self.export, self.tensorboard = self.path / "export", self.path / "tensorboard"
        self.list, self.data = self.path / ".poisonshield.json", self.path / ".poisonshield.data.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this run alone. All ranks call; rank 0 takes the lock, and tells the others if it cannot.

        Of processes that a launcher started none knows before they met who is rank 0; until then the call does nothing.
        Folders that were made for the lock and stay empty are removed. Raises BusyError, StorageError.
        """
        collectives.map_launcher_environment()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield
            return
        new = [p for p in (self.path, *self.path.parents) if not os.path.exists(p)]
        with ExitStack() as stack:
            if collectives.rank() == 0:
                stack.callback(_remove_if_empty, new)
            if busy := together(lambda: self._take(stack), only_first=True, what=f"locking {self.path}"):
                raise BusyError(busy)
            yield

    def _take(self, stack: ExitStack) -> str | None:
        """Hold the lock until the stack is left; what is to be said if another process holds it."""
        try:
            stack.enter_context(Lock(self.path, what="run"))
        except BusyError as err:
            return str(err)
        return None

    def refuse_other_data(self) -> None:
        """Raise ConfigError if the run in the folder had data of other digests than `digests`."""
        if other := self._find_other_data():
            raise ConfigError(
                f"{self.path} holds a run on other data: the digest is another than the run's for {', '.join(other)}.\n"
                "  Give the data that it was trained with, wherever it lies now, or choose another run.dir."
            )

    def wrote_digest(self, place: str) -> bool:
        """Whether the run in the folder wrote down what lay at this place."""
        return place in self._read_digests()

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
            return resume is False or bool(changed) or bool(self._find_other_data())
        serious = changed if resume is False else [c for c in changed if not c.startswith(self.harmless)]
        if serious and resume in (False, "auto"):
            raise ConfigError(
                f"{self.path} holds a run with other settings: {', '.join(serious)}.\n"
                "  Choose another run.dir, put the settings back, or discard that run with run.overwrite=true."
            )
        if resume == "auto":
            self.refuse_other_data()
        if resume is False and (self.results.exists() or any(self.checkpoints.glob("step-*"))):
            raise ConfigError(
                f"{self.path} holds a run of these settings already.\n"
                "  Go on with engine.resume=auto, choose another run.dir, or discard it with run.overwrite=true."
            )
        return resume is False

    def will_load(self, resume: str | bool) -> bool:
        """Whether a run that starts so takes its weights from a checkpoint."""
        return resume not in (False, "auto") or (resume == "auto" and any(self.checkpoints.glob("step-*")))

    def claim(self, record: Mapping[str, Any], *, resume: str | bool) -> None:
        """Make the folder this run's: check, empty it if the run starts anew, write config.yaml. Rank 0 only."""
        if self.check(record, resume=resume):
            self._empty()
        elif changed := self._find_changes(record):
            log.warning("Going on in %s with changed settings: %s.", self.path, ", ".join(changed))
        self.mark()
        write_whole(self.config, yaml.safe_dump(_make_plain(record), sort_keys=False))
        if self.digests:
            write_whole(self.data, json.dumps(self.digests, indent=1))

    def mark(self) -> None:
        """Write down which names runs make here; from then on the folder counts as a run's. Rank 0 only.

        `claim` does it. An experiment that puts something there before its trainer claims the folder marks it first.
        Raises ConfigError if the folder holds something, and no run.
        """
        self._refuse_a_folder_of_others()
        with tell_of_disk(self.path):
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
            old = dict(flatten(self._read_old_record())) if self.config.exists() else {}
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
            return read_file(self.config)[0]
        except ConfigError as err:
            raise ConfigError(f"{self.config} is not readable as a run's settings: {err}") from err

    def _find_changes(self, record: Mapping[str, Any]) -> list[str]:
        if not self.config.exists():
            return []
        old = dict(flatten(self._read_old_record() or {}))
        new = dict(flatten(_make_plain(record)))
        keys = [*new, *(k for k in old if k not in new)]
        # A setting that is null is as good as absent, so that one that came with a later version changes no older run.
        changed = [k for k in keys if k not in _HOW_TO_START and old.get(k) != new.get(k)]
        same = [
            k for k in changed if k in self.places and (_locate(old.get(k)) == _locate(new.get(k)) or self._moved(k))
        ]
        return [k for k in changed if k not in same]

    def _moved(self, place: str) -> bool:
        """Whether what lies at a changed place is the run's data, as far as is known before it is opened."""
        return self.wrote_digest(place) and place not in self._find_other_data()

    def _find_other_data(self) -> list[str]:
        """The places whose data is known not to be that of the run in the folder."""
        known = self._read_digests()
        return [place for place, digest in self.digests.items() if known.get(place, digest) != digest]

    def _read_digests(self) -> dict[str, str]:
        try:
            digests = json.loads(self.data.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            digests = None
        if not isinstance(digests, dict):
            raise ConfigError(f"{self.data} is not readable as digests of data. Remove it to go on without.")
        return digests

    def _empty(self) -> None:
        self.data.unlink(missing_ok=True)
        for path in (self.path / name for name in self._list_made()):
            if path.is_dir() and not path.is_symlink():  # what a link points to is not of this folder
                log.warning("Starting anew: removing %s.", path)
                _remove_kinds(path, _KINDS.get(path.name, _PICTURES))
            else:
                path.unlink(missing_ok=True)


def _remove_kinds(folder: Path, patterns: Sequence[str]) -> None:
    """Remove what a folder holds of these patterns, and the folders that are empty then; anything else stays."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    below = sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True)
    _remove_if_empty([*below, folder])
    if folder.exists():
        log.warning("%s stays: it holds what no run made.", folder)


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """folders: the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _locate(place: Any) -> Any:
    """A path as it is seen from the root; earlier versions wrote it as it was given."""
    return os.path.abspath(place) if isinstance(place, str) and os.path.exists(place) else place


def _make_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as YAML gives it back: tuples are lists, paths are strings."""
    return json.loads(json.dumps(record, default=str))


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.0", leaf) for each leaf; an empty dict or list is a leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)) or not value:
        yield prefix, value
    for key, item in items:
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))

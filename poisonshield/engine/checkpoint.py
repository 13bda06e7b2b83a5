"""Checkpoints that are whole or not there: temporary folder, hash, flush, rename; the last good is never removed first.

    checkpoints/step-00000120/   index.json     what it is, and size and SHA-256 of every other file
                                 index.sha256   the SHA-256 of index.json, as sha256sum writes it
                                 rank-0.pt      random states, stream position, counters of rank 0 (one a rank)
                                 ...            what the backend wrote
Everything is loaded with weights_only=True, so a checkpoint holds tensors and plain values and can run no code.
The price of a save is reading it back once for the hashes.
"""

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import CheckpointError, PoisonShieldError, reason_of
from poisonshield.files import flush, read_bounded, tell_of_disk, write_whole

log = logging.getLogger(__name__)

INDEX, INDEX_HASH = "index.json", "index.sha256"
PREFIX, ASIDE = "step-", "aside-"


MAX_INDEX_BYTES, MAX_NAME = 2**26, 200

_NOT_AN_INDEX = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_plain(value: Any, path: Path) -> None:
    """torch.save for tensors and plain values only. Raises CheckpointError naming the first other thing in it."""
    for where, leaf in _walk_leaves(value, ""):
        if type(leaf) not in (Tensor, torch.nn.Parameter, str, int, float, bool, bytes, type(None)):
            raise CheckpointError(
                f"{path.name} cannot hold {where or 'its value'}: {type(leaf).__qualname__} is neither a tensor nor a "
                "plain value.\n  Keep it in buffers, or turn it into numbers, strings, lists and dicts in state_dict."
            )
    with tell_of_torch(path):
        torch.save(value, path)


@contextmanager
def tell_of_torch(path: Path) -> Iterator[None]:
    """Turn what torch says when a disk takes no more ("unexpected pos") into words. Raises StorageError."""
    with tell_of_disk(path):
        try:
            yield
        except RuntimeError as err:
            if not any(words in str(err) for words in ("unexpected pos", "PytorchStreamWriter", "iostream error")):
                raise
            raise OSError(_why_torch_failed(path), str(err)) from err


def _why_torch_failed(path: Path) -> int:
    """The number of what the disk says to more of a file, or of the last one in a folder; torch does not pass it on."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    try:
        with max(files, key=lambda p: p.stat().st_mtime_ns).open("ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        return err.errno or errno.ENOSPC
    except ValueError:  # not one file was begun
        pass
    return errno.ENOSPC  # there is room again


def load_plain(path: Path) -> Any:
    """What save_plain wrote, on the CPU. Raises CheckpointError if it is anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many kinds; none of them names the file
        raise CheckpointError(f"{path} cannot be read as tensors and plain values: {reason_of(err)}") from err


def _walk_leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk_leaves(item, f"{where}.{key}" if where else str(key))
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from _walk_leaves(item, f"{where}[{i}]")
    else:
        yield where, value


def random_states() -> dict[str, Any]:
    """The state of every global random generator of this process, as tensors and plain values."""
    state = cast("tuple[str, numpy.ndarray, int, int, float]", numpy.random.get_state())
    kind, words, position, has_gauss, cached = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype("int64")), int(position), int(has_gauss), float(cached)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what random_states gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    kind, words, *rest = states["numpy"]
    numpy.random.set_state((kind, words.numpy().astype("uint32"), *rest))


class Checkpoints:
    """The checkpoints of one run, on a disk that all ranks see. Every method is called by all ranks together."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising; whether each is good is not looked at."""
        found = self.folder.glob(f"{PREFIX}*") if self.folder.is_dir() else ()
        return sorted(int(p.name[len(PREFIX) :]) for p in found if p.name[len(PREFIX) :].isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, record: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write one checkpoint: every rank puts its files into a folder with `write`, rank 0 seals it.

        record: what goes into the index beside the hashes. Raises CheckpointError on all ranks if one of them failed.
        """
        draft = self.folder / f".{PREFIX}{step:08d}.tmp"
        together(lambda: _make_fresh_folder(draft), only_first=True, what=f"preparing {draft}")
        try:
            together(lambda: _write_into(draft, write), what=f"writing the checkpoint of step {step}")
            together(lambda: self._seal(draft, step, record), only_first=True, what=f"sealing {draft}")
        except PoisonShieldError:
            if collectives.rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        return self.path(step)

    def _seal(self, draft: Path, step: int, record: dict[str, Any]) -> None:
        with tell_of_disk(draft):
            files = {}
            for path in sorted(p for p in draft.rglob("*") if p.is_file()):
                files[str(path.relative_to(draft))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                flush(path)
            write_whole(draft / INDEX, json.dumps({**record, "step": step, "files": files}, indent=1))
            write_whole(draft / INDEX_HASH, f"{sha256(draft / INDEX)}  {INDEX}\n")
            for folder in {draft, *(p for p in draft.rglob("*") if p.is_dir())}:
                flush(folder)
            if self.path(step).exists():  # the same step of the same run: left by a run that went back behind it
                self._put_aside(self.path(step))
            os.replace(draft, self.path(step))
            flush(self.folder)
            older = [s for s in self.steps() if s < step]
            for old in older[: max(0, len(older) - self.keep + 1)]:
                shutil.rmtree(self.path(old))

    def last_good(self) -> Path | None:
        """The newest checkpoint whose every file has its hash; None if there was never one. Damaged ones are warned of.

        Raises CheckpointError if all that exist are damaged: starting over silently would hide the loss.
        """
        return together(self._last_good, only_first=True, what=f"reading {self.folder}")

    def _last_good(self) -> Path | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self.path(step))
                return self.path(step)
            except CheckpointError as err:
                log.warning("%s\n  Falling back to the checkpoint before it.", err)
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (steps {steps}).\n"
                "  Copy one back, or start over with engine.resume=false run.overwrite=true."
            )
        return None

    def go_back_to(self, step: int) -> None:
        """Put aside what is newer than `step`: damaged, or of a future that this run has left. Drafts are removed."""
        together(lambda: self._clean(step), only_first=True, what=f"tidying {self.folder}")

    def _clean(self, step: int) -> None:
        for newer in (s for s in self.steps() if s > step):
            self._put_aside(self.path(newer))
        if self.folder.is_dir():
            for draft in self.folder.glob(f".{PREFIX}*.tmp"):
                shutil.rmtree(draft)

    def _put_aside(self, path: Path) -> None:
        """Rename it; of all that were put aside the last ones stay, as many as checkpoints are kept."""
        aside = path.with_name(f"{ASIDE}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        log.warning("%s was put aside as %s.", path, aside.name)
        asides = sorted(self.folder.glob(f"{ASIDE}{PREFIX}*"), key=lambda p: p.stat().st_ctime_ns)
        for old in (p for p in asides[: -self.keep] if p != aside):
            shutil.rmtree(old)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint, its files unchecked. Raises CheckpointError if there is none to read."""
    try:
        index = json.loads(read_bounded(path / INDEX, max_bytes=MAX_INDEX_BYTES, what="index"))
        files = {name: {"bytes": int(of["bytes"]), "sha256": str(of["sha256"])} for name, of in index["files"].items()}
        if long := [name for name in files if len(name) > MAX_NAME]:
            raise ValueError(f"a file's name has {len(long[0])} letters")
        return {**index, "files": files, "step": int(index["step"])}
    except _NOT_AN_INDEX as err:
        raise CheckpointError(f"checkpoint {path} has no readable {INDEX}: {err}") from err


def verify(path: Path) -> dict[str, Any]:
    """The index of a checkpoint whose files are all as written. Raises CheckpointError naming the first that is not."""
    index, told = read_index(path), path / INDEX_HASH
    if told.exists() and told.read_text(errors="replace").split() != [sha256(path / INDEX), INDEX]:
        raise CheckpointError(f"checkpoint {path} is damaged: the hash of {INDEX} is not the one in {INDEX_HASH}.")
    named = path.name.removeprefix(PREFIX)
    if named.isdigit() and int(named) != index["step"]:  # checkpoints of earlier versions have no hash of their index
        raise CheckpointError(f"checkpoint {path} is damaged: its {INDEX} says step {index['step']}.")
    for name, want in index["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != want["bytes"]:
            came = "is missing" if size is None else f"has {size} bytes, not {want['bytes']}"
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {came}.")
        if sha256(file) != want["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: the hash of {name} is not the one in {INDEX}.")
    return index


def locate(path: Path) -> Path:
    """The checkpoint that engine.resume=PATH means: itself, or the last good one of a run or checkpoints folder."""
    if (path / INDEX).is_file():
        together(lambda: verify(path), only_first=True, what=f"reading {path}")
        return path
    for folder in (path / "checkpoints", path):
        found = Checkpoints(folder, keep=1).last_good()
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no checkpoint. engine.resume takes a run folder or one checkpoints/step-....")


def _make_fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with tell_of_disk(path):
        path.mkdir(parents=True)


def _write_into(draft: Path, write: Callable[[Path], None]) -> None:
    with tell_of_torch(draft):
        write(draft)


def together(work: Callable[[], Any], *, what: str, only_first: bool = False, patient: bool = False) -> Any:
    """Do `work` on every rank (or on rank 0 alone, giving all its result); if it fails anywhere, fail everywhere.

    patient: for work that may outlast the process group's timeout.
    """
    result, error = None, None
    if not only_first or collectives.rank() == 0:
        try:
            result = work()
        except Exception as err:  # held until the others know, so that nobody waits for a rank that left
            error = err
    failed = bool(collectives.any_rank(error is not None, patient=patient))
    if error is not None:
        known = isinstance(error, PoisonShieldError)
        raise error if known else CheckpointError(f"rank {collectives.rank()}, {what}: {reason_of(error)}") from error
    if failed:
        raise CheckpointError(f"{what} failed on another rank; its message says why.")
    return collectives.broadcast_object(result) if only_first else result

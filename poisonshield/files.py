"""Files as several processes share them: written whole, read within bounds, and known to be ours.

A lock is a small file, made so that only one process can make it, on NFS too. It names its owner's host, process and
start, and the owner touches it every half minute. So a lock whose owner is gone is known: on the same host by the
process table, from another host by its age.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poisonshield.errors import BusyError, ConfigError, DataError, StorageError

LOCK = ".poisonshield.lock"
MADE_LIST = ".poisonshield.files.json"
BEAT = 30.0
"""Seconds between two touches of a lock by its owner."""
STALE_AFTER = 20 * BEAT
"""Seconds after which a lock from another host counts as left behind."""

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EFBIG: "the file would be larger than this disk or process may have",
}


def flush(path: Path) -> None:
    """Ask the disk to really hold a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def draft_of(path: Path) -> Path:
    """A hidden name beside `path` that no other writer has, for what is renamed to `path` once it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a small file in one move, so that no reader ever sees half of it, whoever else writes it too.

    Raises StorageError if the disk does not take it; then what was there stays, and no draft.
    """
    draft = draft_of(path)
    with tell_of_disk(path):
        try:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        flush(path.parent)


@contextmanager
def tell_of_disk(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into words. Raises StorageError with `path`, the reason and the free space."""
    try:
        yield
    except OSError as err:
        if isinstance(err, StorageError) or err.errno not in _DISK_REASONS:
            raise
        raise StorageError(
            f"{path} cannot be written: {_DISK_REASONS[err.errno]} ({_free_space(path)}).\n"
            "  Make room or choose another folder, and start again; what was there before is untouched."
        ) from err


@contextmanager
def tell_of_long_names() -> Iterator[None]:
    """Turn the system's refusal of a name that is too long into words. Raises ConfigError."""
    try:
        yield
    except OSError as err:
        if err.errno != errno.ENAMETOOLONG:
            raise
        raise ConfigError(f"{str(err.filename)[:60]}... is too long for the name of a file or folder.") from err


def read_bounded(path: Path, *, max_bytes: int, what: str) -> bytes:
    """The bytes of a plain file. what: how errors call it.

    Raises DataError for a pipe, a device or a folder, for a file that cannot be read, and for one of more than
    `max_bytes`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for its writer
            raise DataError(f"{what} {path} is no plain file. Give a file, not a pipe, a device or a folder.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as err:
        raise DataError(f"{what} {path} cannot be read: {err.strerror}.") from err
    if len(content) > max_bytes:
        raise DataError(f"{what} {path} is larger than {max_bytes:,} bytes, the most that is read of one.")
    return content


class MadeList:
    """Which files in a folder are ours: names in a hidden list beside them. Only these are ever replaced or removed.

    A name is a path within the folder, with slashes; one of a folder stands for all that is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / MADE_LIST

    def read(self) -> frozenset[str]:
        """The names. Raises ConfigError for a list that is damaged, or names something outside the folder."""
        if not self.path.exists():
            return frozenset()
        try:
            made = json.loads(read_bounded(self.path, max_bytes=2**24, what="list"))["made"]
            if not isinstance(made, list) or not all(isinstance(name, str) and _is_within(name) for name in made):
                raise ValueError("it is no list of names within the folder")
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"{self.path} is not readable as the names of what was made here: {err}.\n"
                "  Choose another folder, or remove that file and what was made here."
            ) from err
        return frozenset(made)

    def refuse_others(self, names: Iterable[str]) -> None:
        """Raise ConfigError if one of these names is there already and is not ours."""
        made = self.read()
        others = [name for name in names if name not in made and os.path.lexists(self.folder / name)]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ConfigError(
                f"{self.folder / others[0]}{more} is there and was not made here, so it is not replaced.\n"
                "  Choose another folder, or move it away."
            )

    def add(self, names: Iterable[str]) -> None:
        """Count these names as ours, before they are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"made": sorted({*self.read(), *names})}, indent=1))


class Lock:
    """The right to write into a folder, held by one process: `with Lock(folder, what="run"):`.

    Raises BusyError if a live process holds it. A process may take a lock that it holds already; the outermost holder
    gives it back. A job that Slurm puts back into its queue takes over the lock of its own earlier start.
    """

    _held: dict[Path, int] = {}

    def __init__(self, folder: Path, *, what: str) -> None:
        self.folder, self.what = folder, what
        self.path = folder.resolve() / LOCK
        self._over = threading.Event()

    def __enter__(self) -> "Lock":
        if not self._held.get(self.path):
            with tell_of_disk(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take()
            threading.Thread(target=self._beat, daemon=True, name="poisonshield lock").start()
        self._held[self.path] = self._held.get(self.path, 0) + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._held[self.path] -= 1
        if not self._held[self.path]:
            del self._held[self.path]
            if _read_owner(self.path).get("token") == _TOKEN:  # else another host took it from us
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        """Make the lock file: written under a name of its own and linked, which fails if the lock is there."""
        draft = draft_of(self.path)
        try:
            draft.write_text(json.dumps(_describe_self()))
            flush(draft)
            for _ in range(3):
                try:
                    os.link(draft, self.path)
                    return
                except FileExistsError:
                    self._remove_if_left_behind(now=draft.stat().st_mtime)
            raise BusyError(f"{self.folder} is being taken by several processes at this moment. Start one of them.")
        finally:
            draft.unlink(missing_ok=True)

    def _remove_if_left_behind(self, *, now: float) -> None:
        """now: the time by the clock of the disk, which may not be that of this host."""
        owner = _read_owner(self.path)
        try:
            age = now - self.path.stat().st_mtime
            if not _is_gone(owner, age):
                raise self._tell(owner)
            aside = draft_of(self.path)  # of two that find it left behind, one moves it
            os.rename(self.path, aside)
        except FileNotFoundError:  # given back, or moved by the other one
            return
        moved = _read_owner(aside)
        if moved != owner:  # it was taken anew in between
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()
        if moved != owner:
            raise self._tell(moved)

    def _tell(self, owner: dict[str, Any]) -> BusyError:
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "an unknown process"
        return BusyError(
            f"{self.folder} is in use: {who} writes this {self.what} (since {owner.get('since', 'some minutes')}).\n"
            f"  Wait for it, stop it, or choose another folder. If it is gone, remove {self.path}."
        )

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a disk may be away for a moment
                if _read_owner(self.path).get("token") == _TOKEN:
                    os.utime(self.path)


@contextmanager
def writing(folder: Path, *, what: str, names: Iterable[str], ours: Iterable[str] = ()) -> Iterator[None]:
    """While open, files of these names may be written into a folder, by this process alone.

    what: how errors call the lot. ours: names that count as made here although no list says so.
    Raises BusyError, StorageError, and ConfigError if one of the names is there and was not made here.
    """
    with Lock(folder, what=what), tell_of_disk(folder):
        made, names = MadeList(folder), list(names)
        if ours := list(ours):
            made.add(ours)
        made.refuse_others(names)
        made.add(names)
        yield


def _is_within(name: str) -> bool:
    return bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


_TOKEN = secrets.token_hex(8)
"""By which this process knows its own locks."""


def _describe_self() -> dict[str, Any]:
    from datetime import datetime

    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "boot": _boot(),
        "token": _TOKEN,
        "slurm": _slurm_start(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _read_owner(path: Path) -> dict[str, Any]:
    """What a lock file says; nothing if it is gone or damaged."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_gone(owner: dict[str, Any], age: float) -> bool:
    job, restarts = _slurm_start() or (None, 0)
    if job and owner.get("slurm") and owner["slurm"][0] == job and owner["slurm"][1] < restarts:
        return True
    if owner.get("host") != socket.gethostname():
        return age > STALE_AFTER
    start = _start_of(owner.get("pid", 0))
    if start is None:  # /proc may hide the processes of others
        return owner.get("boot") != _boot() or not _is_alive(owner.get("pid", 0))
    return (owner.get("boot"), owner.get("start")) != (_boot(), start)


def _slurm_start() -> list[Any] | None:
    """The job, and how often Slurm has started it again; None outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)] if job else None


def _start_of(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks since the boot; None if that cannot be seen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _free_space(path: Path) -> str:
    here = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))
    try:
        return f"{shutil.disk_usage(here).free / 2**20:,.0f} MiB are free at {here}"
    except OSError:
        return "free space unknown"

"""Shards from afar as files on this node: fetched once for all its processes, hashed, and no more of them than allowed.

A shard has a folder, named by its hash and size. Whoever uses it holds a lock beside it, shared with other readers; to
fetch or to remove it takes the lock alone. These are the system's own locks and not those of poisonshield.files: they
can be waited for, go when their process goes, and are not inherited by processes that read data.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from poisonshield.data.manifest import Manifest, ShardInfo
from poisonshield.data.remote import download, join_address, show_address
from poisonshield.data.verify import hash_file
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import tell_of_disk

DEFAULT_GIB = 50.0
_MOMENT = 0.1  # seconds between two looks for room, while others fetch


def cache_folder(kind: str) -> Path:
    """What is kept of one kind: in XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return cache / "poisonshield" / kind


@dataclass(frozen=True)
class AfarFolder:
    """The shards behind an address. gib: how much all shards in this node's cache may take, of this set and others."""

    address: str
    manifest: Manifest
    gib: float = DEFAULT_GIB

    def __str__(self) -> str:
        return show_address(self.address)

    @property
    def origin(self) -> str:
        """What it is known by."""
        return self.address

    def stamp(self, name: str) -> str:
        """Nothing: the hash says all of a shard that is fetched."""
        return ""

    @property
    def room(self) -> int:
        """Of all shards together, in bytes."""
        return int(self.gib * 2**30)

    @contextmanager
    def holding(self, name: str) -> Iterator[Path]:
        """A folder of this node with the shard in it, which stays while this is open; fetched first where it lacks.

        Raises DataError if it cannot be fetched or has another hash, ConfigError if the cache is too small for it.
        """
        root = cache_folder("shards")
        with tell_of_disk(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = root / _folder_name(name, self.manifest.shards[name])
        while True:
            with locked(folder, exclusive=False):
                if (folder / name).exists():
                    os.utime(folder)
                    yield folder
                    return
            with locked(folder, exclusive=True):
                if not (folder / name).exists():
                    self._fetch(name, folder)

    def _fetch(self, name: str, folder: Path) -> None:
        info, part = self.manifest.shards[name], folder / f".{name}.part"
        self._make_room(folder, info, name)
        for last in (False, True):
            download(join_address(self.address, name), part, size=info.bytes)
            found = hash_file(part)
            if found == info.sha256:
                os.replace(part, folder / name)
                return
            part.unlink()  # it changed between two parts, or was damaged: once more from its start
            if last:
                raise DataError(
                    f"shard {name} of {self} is not the one in the manifest: sha256 {found[:12]}..., "
                    f"wanted {info.sha256[:12]}....\n  It was fetched twice. Put the right file there."
                )

    def _make_room(self, folder: Path, info: ShardInfo, name: str) -> None:
        """Count the shard as here, and remove those that were used least lately until all are within the limit."""
        if info.bytes > self.room:
            raise ConfigError(
                f"shard {name} of {self} has {info.bytes:,} bytes, and data.cache={self.gib:g} GiB holds "
                f"{self.room:,}.\n  Set data.cache to more, at least the shards of one window (data.window)."
            )
        while True:
            with locked(folder.parent / "all", exclusive=True):
                others = [p for p in folder.parent.iterdir() if p.is_dir() and p != folder]
                others.sort(key=lambda p: p.stat().st_mtime_ns)
                used = sum(map(_size_of, others))
                while used + info.bytes > self.room and others:
                    if _remove(oldest := others.pop(0)):
                        used -= _size_of(oldest)
                if used + info.bytes <= self.room:
                    with tell_of_disk(folder):
                        folder.mkdir(mode=0o700, exist_ok=True)
                    return
            time.sleep(_MOMENT)  # all that is here is being fetched or read


def _folder_name(name: str, info: ShardInfo) -> str:
    return f"{hashlib.sha256(f'{info.sha256} {name}'.encode()).hexdigest()[:32]}-{info.bytes}"


def _size_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _remove(folder: Path) -> bool:
    """Whether a shard could be removed: nobody reads or fetches it."""
    try:
        with locked(folder, exclusive=True, wait=False) as lock:
            shutil.rmtree(folder)
            lock.unlink()
            return True
    except BlockingIOError:
        return False


@contextmanager
def locked(path: Path, *, exclusive: bool, wait: bool = True) -> Iterator[Path]:
    """Hold the lock file beside a path, alone or with other readers.

    Raises BlockingIOError if it is taken and `wait` is False."""
    lock = path.with_name(f"{path.name}.lock")
    while True:
        with tell_of_disk(lock):
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
            try:
                if _is_still(lock, handle):  # else it was removed with its shard while this one waited
                    yield lock
                    return
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a forked process may have the handle too
        finally:
            os.close(handle)


def _is_still(lock: Path, handle: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def name_of_place(place: str | Path) -> str:
    """By which a folder or an address is known in the cache, 32 hexadecimal digits."""
    what = os.fsencode(place.resolve()) if isinstance(place, Path) else place.partition("?")[0].encode()
    return hashlib.sha256(what).hexdigest()[:32]

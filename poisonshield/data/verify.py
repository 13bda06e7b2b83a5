"""Are these the shards of the manifest? Sizes, hashes, fields, labels and keys, with the index as a by-product.

Each file is read from disk once: hashed from end to end, then its headers are walked while it is in the page cache.
"""

import gzip
import hashlib
import io
import mmap
import os
import tarfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from poisonshield.data.index import Index, index_tar, refuse_repeated_keys, split_name
from poisonshield.data.manifest import Manifest
from poisonshield.errors import DataError
from poisonshield.plain import plain

MAX_UNPACKED_BYTES = 2**30
"""Of all compressed shards of a data set together: they are for small sets that travel, and are held in memory."""


class Room:
    """The memory that compressed shards may take together, however many are unpacked, and in whatever order."""

    def __init__(self) -> None:
        self.left, self.limit, self._lock = MAX_UNPACKED_BYTES, MAX_UNPACKED_BYTES, threading.Lock()

    def take(self, num_bytes: int, path: Path) -> None:
        """Raise DataError naming the shard if there is not so much left."""
        with self._lock:
            self.left -= num_bytes
        if self.left < 0:
            raise DataError(
                f"shard {path.name} unpacks to more than {self.limit:,} bytes, counted over all compressed shards of "
                f"{path.parent}; they would be held in memory.\n"
                f"  Write plain tars instead: poisonshield data import {path.parent} --out DIR"
            )


def refuse_missing(folder: Path, manifest: Manifest) -> None:
    """Raise DataError naming the shards that are in the manifest and not in the folder."""
    if missing := [name for name in manifest.shards if not (folder / name).is_file()]:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise DataError(
            f"{folder}: {len(missing)} of {len(manifest.shards)} shards in the manifest are missing: {shown}\n"
            "  Copy them again, or import the data set again."
        )


def stamp_of(folder: Path | str, manifest: Manifest) -> str:
    """A hash that changes with the manifest, and with the size or modification time of any shard in a folder."""
    files = [(folder / name).stat() for name in manifest.shards] if isinstance(folder, Path) else []
    what = [manifest.model_dump_json(), *(f"{s.st_size}:{s.st_mtime_ns}" for s in files)]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()


Holding = Callable[[str], AbstractContextManager[Path]]
"""Gives the folder in which a shard of this name lies, as long as it is open."""


def verified_index(folder: Path, manifest: Manifest, *, holding: Holding | None = None) -> Index:
    """Check every shard and index it. Raises DataError at the first fault, naming shard and sample.

    holding: for shards that lie in folders of their own."""
    names, room = list(manifest.shards), Room()

    def check(number: int) -> Index:
        with nullcontext(folder) if holding is None else holding(names[number]) as here:
            verify_file(here, manifest, names[number])
            return index_shard(here, manifest, number, room=room)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter free
        index = Index.join(list(pool.map(check, range(len(names)))))
    refuse_repeated_keys(index.keys, index.shard, names)
    return index


def verify_file(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise DataError if a shard is cut off, or has another size or sha256 than the manifest says."""
    path, info = folder / name, manifest.shards[name]
    size = path.stat().st_size
    if size < info.bytes:
        raise DataError(
            f"shard {name} ends early{_last_key(path)} ({size:,} of {info.bytes:,} bytes).\n"
            f"  It was cut off on the way to {folder}. Copy the shard again."
        )
    found = hash_file(path)
    if size != info.bytes or found != info.sha256:
        raise DataError(
            f"shard {name} is not the one in the manifest: sha256 {found[:12]}..., {size:,} bytes; "
            f"wanted {info.sha256[:12]}..., {info.bytes:,} bytes.\n"
            f"  It was changed or damaged in {folder}. Copy the shard again, or import the images again."
        )


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal; 1 to 2 GB/s."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def index_shard(
    folder: Path, manifest: Manifest, number: int, *, faults: list[DataError] | None = None, room: Room | None = None
) -> Index:
    """Where the samples of one shard lie. Raises DataError for a field, label, key or count that does not fit.

    faults: a list that takes those of single samples, all of them, instead of raising the first. room: what compressed
    shards share; None counts this one alone.
    """
    name = list(manifest.shards)[number]
    path, info, classes = folder / name, manifest.shards[name], len(manifest.classes)
    try:
        if name.endswith(".gz"):
            index = index_tar(
                io.BytesIO(unpack(path, room or Room())), number=number, name=name, classes=classes, faults=faults
            )
        else:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                index = index_tar(view, number=number, name=name, classes=classes, faults=faults)
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as err:  # of mmap, for an empty file or a seek beyond it
        raise DataError(f"shard {name} in {folder} is not a whole tar ({err}). Write or copy it again.") from err
    if len(index.keys) != info.samples and not faults:
        raise DataError(
            f"shard {name} holds {len(index.keys)} samples, the manifest says {info.samples}. Import the images again."
        )
    return index


def _last_key(path: Path) -> str:
    """' after sample K', the last one whose header is whole, or ''."""
    last = ""
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                last = member.name
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        pass
    return f" at sample {plain(split_name(last)[0])}" if last else ""


def unpack(path: Path, room: Room) -> bytes:
    """The plain tar inside a .tar.gz, whole in memory, taken out of `room`. DataError where that is used up."""
    blocks = []
    try:
        with gzip.open(path) as packed:
            while block := packed.read(2**20):
                room.take(len(block), path)
                blocks.append(block)
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"shard {path.name} is not a whole gzip file ({err}). Copy the shard again.") from err
    return b"".join(blocks)

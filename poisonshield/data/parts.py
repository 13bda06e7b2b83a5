"""Where the samples of a set lie, shard by shard: each shard is checked when it is first asked for, once on a node.

What was found is kept in the user's cache folder, one small file a shard, so that every process of the node reads it
from there, and a later run too. A process holds the last few of them in memory, however many shards there are.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poisonshield.data.cache import AfarFolder, cache_folder, locked, name_of_place
from poisonshield.data.decode import IMAGE_EXTENSIONS
from poisonshield.data.index import Index
from poisonshield.data.manifest import Manifest
from poisonshield.data.verify import MAX_UNPACKED_BYTES, Room, index_shard, verify_file
from poisonshield.errors import DataError

log = logging.getLogger(__name__)

MOST_SAMPLES = 2**20
"""In memory of one process, some 150 MB; at least one shard's."""


@dataclass(frozen=True)
class NearFolder:
    """The shards in a local or mounted folder."""

    folder: Path
    room = None
    """Bytes; what is here needs none."""

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def origin(self) -> Path:
        """What it is known by."""
        return self.folder

    @contextmanager
    def holding(self, name: str) -> Iterator[Path]:
        """The folder with the shard in it."""
        yield self.folder

    def stamp(self, name: str) -> str:
        """What changes with a shard's file: its size and modification time. Raises DataError if it is missing."""
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError as err:
            raise DataError(f"shard {name} is missing in {self.folder}. Copy it again.") from err
        return f"{found.st_size}:{found.st_mtime_ns}"


class ShardParts:
    """The index of each shard, int64 arrays and keys as in `Index`; samples are numbered in the manifest's order."""

    def __init__(self, manifest: Manifest, files: NearFolder | AfarFolder) -> None:
        self.manifest, self.files, self.names = manifest, files, list(manifest.shards)
        self.starts = np.cumsum([0, *(info.samples for info in manifest.shards.values())])
        self._recent: OrderedDict[int, Index] = OrderedDict()

    def shard_of(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample, int64 [B]."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def rows(self, numbers: np.ndarray) -> Index:
        """What is known of these samples, int64 [B], in their order. Raises DataError for a shard that is unsound."""
        shard = self.shard_of(numbers)
        parts = {number: self.part(number) for number in np.unique(shard).tolist()}
        pairs = list(zip(shard.tolist(), (numbers - self.starts[shard]).tolist(), strict=True))
        arrays = {
            name: np.array([getattr(parts[s], name)[p] for s, p in pairs], dtype=np.int64) for name in Index.ARRAYS
        }
        return Index(keys=tuple(parts[s].keys[p] for s, p in pairs), **arrays)

    def part(self, number: int) -> Index:
        """The index of one shard. Raises DataError as `verify_file` and `index_shard` do."""
        if number not in self._recent:
            self._recent[number] = self._find(number)
            while len(self._recent) > 1 and sum(len(p.keys) for p in self._recent.values()) > MOST_SAMPLES:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]

    def check(self, number: int) -> None:
        """Check one shard and keep what was found for all processes; for a thread beside the reader."""
        self._find(number)

    def whole(self) -> Index:
        """The index of all shards, which makes each of them be read and checked."""
        return Index.join([self._find(number) for number in range(len(self.names))])

    def _find(self, number: int) -> Index:
        path = cache_folder("index") / name_of_place(self.files.origin) / f"{self.names[number]}.npz"
        if (kept := self._recall(path, number)) is not None:
            return kept
        with _lock_if_possible(path):
            if (kept := self._recall(path, number)) is not None:  # another process was faster
                return kept
            with self.files.holding(self.names[number]) as folder:
                stamp = self._stamp(number)
                verify_file(folder, self.manifest, self.names[number])
                found = index_shard(folder, self.manifest, number, room=Room())
            try:
                found.save(path, stamp=stamp)
            except OSError as err:
                log.debug("%s: what was found in it cannot be kept (%s)", self.names[number], err)
            return found

    def _recall(self, path: Path, number: int) -> Index | None:
        """What was kept of a shard, or None if there is nothing, another user wrote it, or it does not fit."""
        try:
            if path.stat().st_uid != os.getuid():
                return None
        except OSError:
            return None
        kept = Index.load(path, stamp=self._stamp(number))
        if kept is None or not self._fits(kept, number):
            return None
        return replace(kept, shard=np.full(len(kept.keys), number))

    def _fits(self, kept: Index, number: int) -> bool:
        info, count = self.manifest.shards[self.names[number]], len(kept.keys)
        room = MAX_UNPACKED_BYTES if self.names[number].endswith(".gz") else info.bytes
        arrays = [getattr(kept, name) for name in Index.ARRAYS]
        return (
            count == info.samples == len(set(kept.keys))
            and all(a.dtype == np.int64 and a.shape == (count,) and a.min() >= 0 for a in arrays)
            and bool(kept.labels.max() < len(self.manifest.classes) and kept.codec.max() < len(IMAGE_EXTENSIONS))
            and bool((kept.length <= room - kept.offset).all())
        )

    def _stamp(self, number: int) -> str:
        """Changes with the shard's entry in the manifest, and with size or modification time of a file in a folder."""
        info = self.manifest.shards[self.names[number]]
        stamp = f"{info.sha256} {info.samples} of {len(self.manifest.classes)}"
        return f"{stamp} {self.files.stamp(self.names[number])}"


@contextmanager
def _lock_if_possible(path: Path) -> Iterator[None]:
    """Hold a shard's kept index alone; without it several processes check one shard, which costs time only."""
    held: AbstractContextManager[Path] | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = locked(path, exclusive=True)
        held.__enter__()
    except OSError:
        held = None
    try:
        yield
    finally:
        if held is not None:
            held.__exit__(None, None, None)

"""The kept index of a verified data set: what lets `verify: once` trust files it has read before.

It lies in the user's own cache folder, never beside the data: whoever may hand over a data set could hand over an index
with it, and then other bytes and labels would pass as verified. It is still checked against manifest and files.
"""

import os
from pathlib import Path

from poisonshield.data.cache import cache_folder, name_of_place
from poisonshield.data.index import Index
from poisonshield.data.manifest import Manifest, ShardInfo
from poisonshield.data.verify import MAX_UNPACKED_BYTES, stamp_of


def index_path(folder: Path | str) -> Path:
    """Where the index of a data set is kept, by the path of its folder, or by its address."""
    return cache_folder("index") / f"{name_of_place(folder)}.npz"


def recall_index(folder: Path | str, manifest: Manifest) -> Index | None:
    """The kept index, or None if there is none, another user wrote it, or it does not fit the files as they are."""
    path = index_path(folder)
    try:
        if path.stat().st_uid != os.getuid():
            return None
    except OSError:
        return None
    index = Index.load(path, stamp=stamp_of(folder, manifest))
    return index if index is not None and index.fits(manifest, _room_in(folder, manifest)) else None


def keep_index(folder: Path | str, manifest: Manifest, index: Index) -> None:
    """Keep an index that was verified. Raises OSError if the cache folder cannot be written."""
    path = index_path(folder)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    index.save(path, stamp=stamp_of(folder, manifest))


def _room_in(folder: Path | str, manifest: Manifest) -> list[int]:
    """The bytes of each shard's tar; of a compressed one the most that it may unpack to."""

    def room(name: str, info: ShardInfo) -> int:
        if name.endswith(".gz"):
            return MAX_UNPACKED_BYTES
        return (folder / name).stat().st_size if isinstance(folder, Path) else info.bytes

    return [room(name, info) for name, info in manifest.shards.items()]

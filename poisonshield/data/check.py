"""Every problem of a data set, not only the first: what `poisonshield data verify` lists."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from poisonshield.data.decode import load_codecs
from poisonshield.data.index import Index, repeated_keys
from poisonshield.data.manifest import Manifest
from poisonshield.data.shards import ShardSet
from poisonshield.data.verify import Room, index_shard, refuse_missing, verify_file
from poisonshield.errors import DataError


def problems(folder: str | Path) -> list[str]:
    """One worded problem each: files, hashes, fields, labels, keys, and every image decoded and measured.

    Empty if the data set is sound. Costs a full decode. A shard whose hash is wrong is decoded all the same if its tar
    can be walked, because naming the broken image helps more than naming the file. Images of samples whose fields,
    labels or keys are wrong are not decoded.
    """
    folder = Path(folder)
    found: list[str] = []
    parts: list[Index] = []
    try:
        manifest = Manifest.load(folder)
    except DataError as err:
        return [str(err)]
    names, room = list(manifest.shards), Room()
    _note(found, partial(refuse_missing, folder, manifest))
    for number, name in enumerate(names):
        if (folder / name).is_file():
            _note(found, partial(verify_file, folder, manifest, name))
            faults: list[DataError] = []
            try:
                parts.append(index_shard(folder, manifest, number, faults=faults, room=room))
            except DataError as err:
                found.append(str(err))
            found += map(str, faults)
    if parts:
        index = Index.join(parts)
        found += map(str, repeated_keys(index.keys, index.shard, names))
        found += _pixel_problems(ShardSet(folder, manifest, index))
    return found


def _note(found: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except DataError as err:
        found.append(str(err))


def _pixel_problems(shards: ShardSet) -> list[str]:
    def look(i: int) -> str | None:
        try:
            shards.read(torch.tensor([i])) if shards.image_size is not None else shards.decode(i)
        except DataError as err:
            return str(err)
        return None

    load_codecs()
    with ThreadPoolExecutor() as pool:  # the codecs leave the interpreter free
        return [problem for problem in pool.map(look, range(len(shards)), chunksize=64) if problem]

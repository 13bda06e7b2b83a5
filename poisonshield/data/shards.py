"""A data set in a folder of tar shards, read by index.

The tars are ordinary WebDataset shards, but they are not streamed: one pass at open verifies the hashes and notes where
each image lies, and from then on any sample is one `pread`. That is why every sample comes exactly once an epoch for
any number of ranks and workers, with no rule such as shards >= ranks * workers, and why a resume reads nothing twice.
The trade-off: opening costs one read of all bytes (`verify="once"` keeps the result in the user's cache folder), and a
cold disk sees requests inside a window of shards instead of one long read. Shards from afar are files as well, in this
node's cache (data/cache.py).
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.ahead import Fetcher, Reach
from poisonshield.data.cache import DEFAULT_GIB, AfarFolder, cache_folder
from poisonshield.data.decode import IMAGE_EXTENSIONS, decode
from poisonshield.data.index import Index, refuse_repeated_keys
from poisonshield.data.index_cache import index_path, keep_index, recall_index
from poisonshield.data.manifest import FILE_NAME, Manifest
from poisonshield.data.parts import NearFolder, ShardParts
from poisonshield.data.remote import is_address, show_address
from poisonshield.data.source import BadSample, Place
from poisonshield.data.verify import Room, refuse_missing, unpack, verified_index
from poisonshield.errors import DataError
from poisonshield.random import sample_ids

log = logging.getLogger(__name__)

Verify = Literal["always", "once", "lazy"]


class ShardSet:
    """The samples of one data set. Open it with `ShardSet.open(folder)`; it can be sent to worker processes.

    keys tuple of N; ids, labels, shard int64 [N] (id: hash of the key; shard: number in the manifest). If the set was
    opened lazily they are known once they are asked for, which reads every shard.
    classes, image_size, digest as in the manifest. origin: its folder or address; place: the same for people. folder:
    of its files; the node's cache for shards from afar.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, index: Index | None = None, *, files: AfarFolder | None = None
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.files = files or NearFolder(folder)
        self.parts = ShardParts(manifest, self.files)
        if index is not None:
            self.index = index
        self.origin, self.place = self.files.origin, str(self.files)
        self.classes, self.image_size, self.digest = manifest.classes, manifest.image_size, manifest.digest
        self.bad_limit = 0
        self._names = list(manifest.shards)
        self._unpacked: dict[str, bytes] = {}
        self._room = Room()

    @cached_property
    def index(self) -> Index:
        """Of all samples. A set that was opened lazily reads every shard for it."""
        index = self.parts.whole()
        refuse_repeated_keys(index.keys, index.shard, self._names)
        return index

    @property
    def is_lazy(self) -> bool:
        """Whether shards are checked as they are read."""
        return "index" not in self.__dict__

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """N names."""
        return self.index.keys

    @cached_property
    def ids(self) -> Tensor:
        """int64 [N], a hash of each key."""
        return sample_ids(self.index.keys)

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return torch.from_numpy(self.index.labels)

    @cached_property
    def shard(self) -> Tensor:
        """int64 [N], numbers in the manifest."""
        return torch.from_numpy(self.index.shard)

    @classmethod
    def open(
        cls, folder: str | Path, *, verify: Verify = "always", cache: float = DEFAULT_GIB, bad_limit: int = 0
    ) -> "ShardSet":
        """Check a data set and open it.

        folder: or an address such as https://HOST/SET or s3://BUCKET/SET; its shards go through a cache on this node of
        at most `cache` GiB, and each is hashed as it comes, whatever `verify` says.
        verify: "always" reads every byte and compares hashes; "once" does so the first time, keeps the index in
        the user's cache folder (data/index_cache.py), and later trusts it while manifest, sizes and modification times
        stay the same; "lazy" reads the manifest only, and checks each shard when it is first read, once on a node.
        bad_limit: how many samples whose image cannot be read may be left out (data/bad.py).
        Raises DataError for a missing, truncated or changed shard, an unknown or pickled field, a label outside the
        classes, a repeated key. Pixels are decoded later; `poisonshield data verify` decodes them all.
        """
        if is_address(folder):
            return cls._open_afar(str(folder), verify, cache)._leave_out(bad_limit)
        manifest = Manifest.load(folder)
        folder = Path(folder)
        if verify == "lazy":
            return cls(folder, manifest)._leave_out(bad_limit)
        refuse_missing(folder, manifest)
        index = _find_index(folder, manifest, NearFolder(folder), keep=verify == "once")
        return cls(folder, manifest, index)._leave_out(bad_limit)

    def _leave_out(self, limit: int) -> "ShardSet":
        self.bad_limit = limit
        return self

    @classmethod
    def _open_afar(cls, address: str, verify: str, cache: float) -> "ShardSet":
        manifest = Manifest.fetch(address)
        if manifest is None:
            raise DataError(
                f"{show_address(address)} has no {FILE_NAME}, so it is no data set.\n"
                "  Make one with poisonshield data import, and put its whole folder there."
            )
        files = AfarFolder(address, manifest, cache)
        index = None if verify == "lazy" else _find_index(address, manifest, files, keep=verify == "once")
        return cls(cache_folder("shards"), manifest, index, files=files)

    def __len__(self) -> int:
        return self.manifest.samples if self.is_lazy else len(self.index.keys)

    def __repr__(self) -> str:
        return f"ShardSet({self.place!r}, {len(self)} samples, {len(self.classes)} classes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": {}, "_room": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_room": Room()}

    def where(self, i: int) -> str:
        """How sample i is called in an error: its key and shard."""
        return self._name(self._rows(np.array([i])), 0)

    def extension(self, i: int) -> str:
        """jpg, jpeg or png."""
        return IMAGE_EXTENSIONS[self._rows(np.array([i])).codec[0]]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many samples each shard has; they are numbered shard by shard."""
        return tuple(info.samples for info in self.manifest.shards.values())

    def fetch(self, shard: int) -> None:
        """Bring a shard from afar into this node's cache. Raises DataError if it cannot be had or is unsound."""
        with self.files.holding(self._names[shard]):
            pass  # not held while it is checked: a check takes the lock of what is kept of a shard before this one
        if self.is_lazy:
            self.parts.check(shard)

    def fetching(self, walk: Iterator[Place]) -> AbstractContextManager[Reach]:
        """While open, shards from afar that the walk will read are fetched. It takes where the reader has come to."""
        if self.files.room is None:
            return nullcontext(lambda epoch, step: None)
        needs = ((epoch, step, np.unique(self.parts.shard_of(i.numpy())).tolist()) for epoch, step, i in walk)
        sizes = [info.bytes for info in self.manifest.shards.values()]
        return Fetcher(self.fetch, needs, sizes=sizes, room=self.files.room / 2).running()

    def look_up(self, indices: Tensor) -> tuple[tuple[str, ...], Tensor]:
        """Keys, and labels int64 [B], of these samples."""
        rows = self._rows(indices.numpy())
        return rows.keys, torch.from_numpy(rows.labels)

    def _rows(self, wanted: np.ndarray) -> Index:
        return self.parts.rows(wanted) if self.is_lazy else self.index.take(wanted)

    def _name(self, rows: Index, row: int) -> str:
        return f"sample {rows.keys[row]} in {self._names[rows.shard[row]]}"

    def encoded(self, indices: Tensor) -> list[bytes]:
        """The image files of these samples, int64 [B], unread by any codec.

        Shards are opened and closed on each call: nothing to share between processes, nothing to leak.
        """
        return self._files_of(self._rows(np.asarray(indices, dtype=np.int64)))

    def _files_of(self, rows: Index) -> list[bytes]:
        found: list[bytes] = [b""] * len(rows.keys)
        order = np.lexsort((rows.offset, rows.shard))
        for part in np.split(order, np.flatnonzero(np.diff(rows.shard[order])) + 1) if len(order) else ():
            with self._opened(self._names[int(rows.shard[part[0]])]) as file:  # one shard after the other, forwards
                _announce(file, rows, part)
                for row in part.tolist():
                    found[row] = self._bytes_at(file, rows, row)
        return found

    def decode(self, i: int) -> Tensor:
        """Sample i as uint8 [3, h, w] in its own size. Raises DataError if it is broken."""
        return decode(self.encoded(torch.tensor([i]))[0], self.extension(i), name=self.where(i))

    def read(self, indices: Tensor, *, out: Tensor | None = None) -> Tensor:
        """These samples as uint8 [B, 3, H, W]; indices int64 [B], any order. Pixels lie as a decoder writes them,
        channels last, unless `out` is given.

        Raises BadSample naming key and shard for a broken image, or one of another size than the manifest's.
        """
        if self.image_size is None:
            raise DataError(
                f"{self.place} holds images of differing sizes, batches need one size.\n"
                f"  Make it so: poisonshield data import {self.place} --size S --out DIR"
            )
        height, width = self.image_size
        pixels = out
        rows = self._rows(np.asarray(indices, dtype=np.int64))
        for row, data in enumerate(self._files_of(rows)):
            try:
                image = decode(data, IMAGE_EXTENSIONS[rows.codec[row]], name=self._name(rows, row))
            except DataError as err:
                raise BadSample(str(err)) from err
            if tuple(image.shape[1:]) != self.image_size:
                h, w = image.shape[1:]
                raise BadSample(
                    f"{self._name(rows, row)} is {h}x{w} pixels, the manifest says {height}x{width} (height x width).\n"
                    "  Bring all to one size: "
                    f"poisonshield data import {self.place} --size {min(height, width)} --out DIR"
                )
            if pixels is None:  # not before an image has the size that the manifest claims, which may be any
                pixels = torch.empty((len(indices), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            np.copyto(pixels[row].numpy(), image.numpy())  # by one thread: torch would wake its others for each image
        return torch.empty((0, 3, height, width), dtype=torch.uint8) if pixels is None else pixels

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        if name.endswith(".gz"):
            if name not in self._unpacked:
                with self.files.holding(name) as folder:
                    self._unpacked[name] = unpack(folder / name, self._room)
            yield io.BytesIO(self._unpacked[name])  # shares the bytes until written to, and it never is
            return
        with self.files.holding(name) as folder, open(folder / name, "rb", buffering=0) as file:
            yield file

    def _bytes_at(self, file: Any, rows: Index, row: int) -> bytes:
        offset, length = int(rows.offset[row]), int(rows.length[row])
        if isinstance(file, io.BytesIO):
            data = bytes(file.getbuffer()[offset : offset + length])
        else:
            data = os.pread(file.fileno(), length, offset)
        if len(data) < length:
            name = self._name(rows, row)
            raise DataError(f"{name}: the shard became shorter since it was opened. Copy it again and resume.")
        return data


def _announce(file: Any, rows: Index, part: np.ndarray) -> None:
    """Tell the kernel what is read next of a shard, so that a cold disk is asked for all of it at once."""
    if not isinstance(file, io.BytesIO) and hasattr(os, "posix_fadvise"):
        for offset, length in zip(rows.offset[part], rows.length[part], strict=True):
            os.posix_fadvise(file.fileno(), int(offset), int(length), os.POSIX_FADV_WILLNEED)


def _find_index(place: Path | str, manifest: Manifest, files: NearFolder | AfarFolder, *, keep: bool) -> Index:
    """The kept index, or one made from all shards, which is then kept if it is to be."""
    index = recall_index(place, manifest) if keep else None
    if index is None:
        index = verified_index(Path(str(files)), manifest, holding=files.holding)
        if keep:
            try:
                keep_index(place, manifest, index)
            except OSError as err:
                where, why = index_path(place).parent, err.strerror
                log.warning("%s: no index can be kept in %s (%s), so every open verifies again", files, where, why)
    return index

"""A data set in a folder of tar shards, read by index.

The tars are ordinary WebDataset shards, but they are not streamed: one pass at open verifies the hashes and notes where
each image lies, and from then on any sample is one `pread`. That is why every sample comes exactly once an epoch for any
number of ranks and workers, with no rule such as shards >= ranks * workers, and why resuming skips nothing by reading it.
The trade-off: shards must be local or mounted files, opening costs one read of all bytes (`verify="once"` keeps the
result beside the data), and a cold disk sees requests inside a window of shards instead of one long read.
"""

import gzip
import hashlib
import io
import logging
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.decode import IMAGE_EXTENSIONS, decode
from poisonshield.data.index import Index, index_tar, refuse_repeated_keys
from poisonshield.data.manifest import Manifest
from poisonshield.errors import DataError
from poisonshield.ops.philox import sample_ids

log = logging.getLogger(__name__)

INDEX_NAME = ".index.npz"
MAX_UNPACKED_BYTES = 2**30  # compressed shards are for small bundled sets; they are held in memory


class ShardSet:
    """The samples of one data set. Open it with `ShardSet.open(folder)`; it can be sent to worker processes.

    keys tuple of N; ids, labels, shard int64 [N] (id: hash of the key; shard: number in the manifest);
    classes, image_size, digest as in the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: Index) -> None:
        self.folder, self.manifest, self.index = folder, manifest, index
        self.classes, self.image_size, self.digest = manifest.classes, manifest.image_size, manifest.digest
        self.keys = index.keys
        self.ids = sample_ids(index.keys)
        self.labels = torch.from_numpy(index.labels)
        self.shard = torch.from_numpy(index.shard)
        self._names = list(manifest.shards)
        self._unpacked: dict[str, bytes] = {}

    @classmethod
    def open(cls, folder: str | Path, *, verify: Literal["always", "once"] = "always") -> "ShardSet":
        """Check a data set and open it.

        verify: "always" reads every byte and compares hashes; "once" does so the first time, keeps the index in
        `.index.npz`, and later trusts it while manifest, sizes and modification times stay the same.
        Raises DataError for a missing, truncated or changed shard, an unknown or pickled field, a label outside the
        classes, a repeated key. Pixels are decoded later; `poisonshield data verify` decodes them all.
        """
        manifest = Manifest.load(folder)
        folder = Path(folder)
        _refuse_missing(folder, manifest)
        stamp = _stamp(folder, manifest) if verify == "once" else ""
        index = Index.load(folder / INDEX_NAME, stamp=stamp) if stamp else None
        if index is None:
            index = _verified_index(folder, manifest)
            if stamp:
                try:
                    index.save(folder / INDEX_NAME, stamp=stamp)
                except OSError as err:
                    log.warning("%s: the index cannot be kept (%s), so every open verifies again", folder, err.strerror)
        return cls(folder, manifest, index)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"ShardSet({str(self.folder)!r}, {len(self)} samples, {len(self.classes)} classes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": {}}

    def where(self, i: int) -> str:
        """How sample i is called in an error: its key and shard."""
        return f"sample {self.keys[i]} in {self._names[self.index.shard[i]]}"

    def extension(self, i: int) -> str:
        """jpg, jpeg or png."""
        return IMAGE_EXTENSIONS[self.index.codec[i]]

    def encoded(self, indices: Tensor) -> list[bytes]:
        """The image files of these samples, int64 [B], unread by any codec.

        Shards are opened and closed on each call: nothing to share between processes, nothing to leak.
        """
        wanted = indices.numpy() if isinstance(indices, Tensor) else np.asarray(indices, dtype=np.int64)
        found: list[bytes] = [b""] * len(wanted)
        shard, offset = self.index.shard[wanted], self.index.offset[wanted]
        file, current = None, -1
        try:
            for position in np.lexsort((offset, shard)).tolist():  # one shard after the other, forwards
                i = int(wanted[position])
                if current != self.index.shard[i]:
                    if file is not None:
                        file.close()
                    current = int(self.index.shard[i])
                    file = self._open(self._names[current])
                found[position] = self._bytes_at(file, i)
        finally:
            if file is not None:
                file.close()
        return found

    def decode(self, i: int) -> Tensor:
        """Sample i as uint8 [3, h, w] in its own size. Raises DataError if it is broken."""
        return decode(self.encoded(torch.tensor([i]))[0], self.extension(i), name=self.where(i))

    def read(self, indices: Tensor) -> Tensor:
        """These samples as uint8 [B, 3, H, W]; indices int64 [B], any order.

        Raises DataError naming key and shard for a broken image, or one of another size than the manifest's.
        """
        if self.image_size is None:
            raise DataError(
                f"{self.folder} holds images of differing sizes, batches need one size.\n"
                f"  Make it so: poisonshield data import {self.folder} --size S --out DIR"
            )
        height, width = self.image_size
        pixels = torch.empty((len(indices), 3, height, width), dtype=torch.uint8)
        for row, (i, data) in enumerate(zip(indices.tolist(), self.encoded(indices))):
            image = decode(data, self.extension(i), name=self.where(i))
            if tuple(image.shape[1:]) != self.image_size:
                h, w = image.shape[1:]
                raise DataError(
                    f"{self.where(i)} is {h}x{w} pixels, the manifest says {height}x{width} (height x width).\n"
                    f"  Bring all to one size: poisonshield data import {self.folder} --size {min(height, width)} --out DIR"
                )
            pixels[row] = image
        return pixels

    def _open(self, name: str) -> Any:
        if not name.endswith(".gz"):
            return open(self.folder / name, "rb", buffering=0)
        if name not in self._unpacked:
            self._unpacked[name] = _unpack(self.folder / name)
        return io.BytesIO(self._unpacked[name])  # shares the bytes until written to, and it never is

    def _bytes_at(self, file: Any, i: int) -> bytes:
        offset, length = int(self.index.offset[i]), int(self.index.length[i])
        if isinstance(file, io.BytesIO):
            data = bytes(file.getbuffer()[offset : offset + length])
        else:
            data = os.pread(file.fileno(), length, offset)
        if len(data) < length:
            raise DataError(f"{self.where(i)}: the shard became shorter since it was opened. Copy it again and resume.")
        return data


def _refuse_missing(folder: Path, manifest: Manifest) -> None:
    if missing := [name for name in manifest.shards if not (folder / name).is_file()]:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise DataError(
            f"{folder}: {len(missing)} of {len(manifest.shards)} shards in the manifest are missing: {shown}\n"
            "  Copy them again, or import the data set again."
        )


def _stamp(folder: Path, manifest: Manifest) -> str:
    files = [(folder / name).stat() for name in manifest.shards]
    what = [manifest.digest, str(len(manifest.classes)), *(f"{s.st_size}:{s.st_mtime_ns}" for s in files)]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()


def _verified_index(folder: Path, manifest: Manifest) -> Index:
    names = list(manifest.shards)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter free
        parts = list(pool.map(lambda n: _verified_shard(folder, manifest, n), range(len(names))))
    index = Index.join(parts)
    refuse_repeated_keys(index.keys, index.shard, names)
    return index


def _verified_shard(folder: Path, manifest: Manifest, number: int) -> Index:
    name = list(manifest.shards)[number]
    path, info, classes = folder / name, manifest.shards[name], len(manifest.classes)
    size = path.stat().st_size
    if size < info.bytes:
        raise DataError(
            f"shard {name} ends early{_last_key(path)} ({size:,} of {info.bytes:,} bytes).\n"
            f"  It was cut off on the way to {folder}. Copy the shard again."
        )
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found = hashlib.sha256(view).hexdigest()
        if size != info.bytes or found != info.sha256:
            raise DataError(
                f"shard {name} is not the one in the manifest: sha256 {found[:12]}..., {size:,} bytes; "
                f"wanted {info.sha256[:12]}..., {info.bytes:,} bytes.\n"
                f"  It was changed or damaged in {folder}. Copy the shard again, or import the images again."
            )
        stream = io.BytesIO(_unpack(path)) if name.endswith(".gz") else view
        index = index_tar(stream, number=number, name=name, classes=classes)
    if len(index.keys) != info.samples:
        raise DataError(
            f"shard {name} holds {len(index.keys)} samples, the manifest says {info.samples}. Import the images again."
        )
    return index


def _last_key(path: Path) -> str:
    """' after sample K', the last one whose header is whole, or ''."""
    import tarfile

    last = ""
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                last = member.name
    except (tarfile.TarError, OSError, EOFError):
        pass
    return f" at sample {last.partition('.')[0]}" if last else ""


def _unpack(path: Path) -> bytes:
    """The plain tar inside a .tar.gz, whole in memory; DataError beyond 1 GiB."""
    try:
        with gzip.open(path) as packed:
            data = packed.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError) as err:
        raise DataError(f"shard {path.name} is not a whole gzip file ({err}). Copy the shard again.") from err
    if len(data) > MAX_UNPACKED_BYTES:
        raise DataError(
            f"shard {path.name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes; compressed shards are held in memory.\n"
            f"  Write plain tars instead: poisonshield data import {path.parent} --out DIR"
        )
    return data

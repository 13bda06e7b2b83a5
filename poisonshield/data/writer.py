"""Tar shards and their manifest, the same bytes for the same samples.
Everything is written under temporary names and renamed when all of it is whole; the manifest comes last. So an
interrupted run leaves nothing that could be mistaken for a data set, and an old one stays until the new one is done.
One writer has a folder at a time.
"""

import gzip
import hashlib
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.data.decode import IMAGE_EXTENSIONS, encode_png
from poisonshield.data.manifest import FILE_NAME, Manifest, ShardInfo, refuse_address
from poisonshield.data.tars import tar_writer
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import Lock, MadeList, draft_of, flush, tell_of_disk
from poisonshield.plain import is_plain


class ShardWriter:
    """Writes one data set: `with ShardWriter(out, classes=..., image_size=(H, W)) as w: w.write(key, image, label)`.

    poison: None for clean data; otherwise a dict that goes into the manifest as it stands when the writer closes, and
    every lossy format is refused. image_size: None when sizes differ, or not known yet: the attribute may be set until
    the writer closes. compress: .tar.gz shards, for small sets that travel inside a package.
    Raises DataError for a data set that is already there (unless overwrite), a repeated or unfit key, a label outside
    the classes, another image size, a class name that comes twice; ConfigError for an empty shard size; BusyError
    if another process writes into the folder, StorageError if the disk does not take it. Leaving the block by an
    exception leaves the folder as it was.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: tuple[str, ...] | list[str],
        image_size: tuple[int, int] | None,
        samples_per_shard: int = 5000,
        provenance: str = "",
        poison: dict[str, Any] | None = None,
        overwrite: bool = False,
        compress: bool = False,
    ) -> None:
        refuse_address(folder, role="output folder")
        self.folder, self.classes, self.image_size = Path(folder), tuple(classes), image_size
        self.samples_per_shard, self.provenance, self.poison = samples_per_shard, provenance, poison
        self.ending = ".tar.gz" if compress else ".tar"
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard is {samples_per_shard}, at least 1 was wanted.")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            twice = next((c for c in self.classes if self.classes.count(c) > 1), None)
            what = f"class name {twice!r} comes twice" if twice is not None else "there is no class"
            raise DataError(f"{what} in what is to be written to {self.folder}. Name each class once.")
        if odd := next((c for c in self.classes if not is_plain(c)), None):
            raise DataError(f"class name {odd!r} has control characters. Rename the class in what is imported.")
        self.overwrite = overwrite
        self._refuse_what_is_there()
        self._new_folders = new_folders(self.folder)
        with tell_of_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._keys: set[str] = set()
        self._shards: dict[str, ShardInfo] = {}
        self._whole: list[_Shard] = []
        self._shard: _Shard | None = None

    def __enter__(self) -> "ShardWriter":
        try:
            self._lock.enter_context(Lock(self.folder, what="data set"))
            self._refuse_what_is_there()  # who had the lock before may just have written it
            _remove_drafts(self.folder)
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
            else:
                self.abandon()
        finally:
            self._give_back()

    def write(self, key: str, image: Tensor, label: int) -> None:
        """Add one image, uint8 [3, H, W], losslessly as PNG."""
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise DataError(f"sample {key} is {image.dtype} {tuple(image.shape)}, uint8 (3, H, W) was wanted.")
        if self.image_size is not None and tuple(image.shape[1:]) != tuple(self.image_size):
            raise DataError(f"sample {key} is {tuple(image.shape[1:])} pixels, {tuple(self.image_size)} was declared.")
        self.write_encoded(key, encode_png(image, name=f"sample {key}"), "png", label)

    def write_encoded(self, key: str, data: bytes, extension: str, label: int) -> None:
        """Add one image file as it is. Its pixels are not looked at; `poisonshield data verify` does that."""
        extension = extension.lower()
        if extension not in IMAGE_EXTENSIONS:
            raise DataError(f"sample {key} is a .{extension} file, one of {', '.join(IMAGE_EXTENSIONS)} was wanted.")
        if self.poison is not None and extension != "png":
            raise DataError(
                f"sample {key} would be stored as lossy .{extension} in a poisoned data set.\n"
                "  Lossy compression is itself a defense: it changes the perturbation and its budget. Write PNG."
            )
        if not key or "." in key or not key.isprintable() or key.startswith("/") or len(key.encode()) > 200:
            raise DataError(f"key {key!r} is unfit: 1 to 200 printable bytes, no dots, no leading slash were wanted.")
        if key in self._keys:
            raise DataError(f"sample {key} is written twice to {self.folder}; keys must be unique.")
        if not 0 <= int(label) < len(self.classes):
            raise DataError(f"sample {key} has label {label}, a number from 0 to {len(self.classes) - 1} was wanted.")
        with tell_of_disk(self.folder):
            if self._shard is None:
                self._shard = _Shard(self.folder / f"shard-{len(self._shards):05d}{self.ending}")
            self._shard.add(key, data, extension, int(label))
            self._keys.add(key)
            if self._shard.samples == self.samples_per_shard:
                self._finish_shard()

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest. Raises DataError if no sample was written."""
        described = draft_of(self.folder / FILE_NAME)
        try:
            with tell_of_disk(self.folder):
                manifest = self._finish()
                described.write_text(manifest.text, encoding="utf-8")
                flush(described)
                made = MadeList(self.folder)  # until there is a manifest it says whose these shards are
                made.add(shard.path.name for shard in self._whole)
                remove_dataset(self.folder)
                for shard in self._whole:
                    os.replace(shard.temporary, shard.path)
                os.replace(described, self.folder / FILE_NAME)
                flush(self.folder)
                made.path.unlink()
        except BaseException:
            described.unlink(missing_ok=True)
            self.abandon()
            raise
        return manifest

    def abandon(self) -> None:
        """Remove what this writer wrote; what was in the folder before stays."""
        for shard in (*self._whole, *filter(None, [self._shard])):
            shard.abandon()
        remove_empty(self._new_folders)

    def _refuse_what_is_there(self) -> None:
        if (self.folder / FILE_NAME).exists() and not self.overwrite:
            raise DataError(
                f"{self.folder} already holds a data set; it is not overwritten unless asked to.\n"
                "  Choose another folder, remove this one, or set overwrite."
            )
        known = {*_list_shards(self.folder), *MadeList(self.folder).read()}
        others = [p.name for p in sorted(self.folder.glob("shard-*")) if p.name not in known]
        if others:
            raise DataError(
                f"{self.folder / others[0]} belongs to no data set in {self.folder}, and is not written over.\n"
                "  Choose another folder, or move such files away."
            )

    def _give_back(self) -> None:
        self._lock.close()
        remove_empty(self._new_folders)

    def _finish(self) -> Manifest:
        """Everything that can fail for what was written, before anything old is touched."""
        self._finish_shard()
        if not self._shards:
            raise DataError(f"no sample was written to {self.folder}, so there is no data set.")
        manifest = Manifest(
            classes=self.classes,
            image_size=self.image_size,
            samples=len(self._keys),
            shards=self._shards,
            provenance=self.provenance,
            poison=self.poison,
        )
        manifest.model_dump_json()  # a poison dict with things in it that JSON cannot hold
        return manifest

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards[self._shard.path.name] = self._shard.finish()
            self._whole.append(self._shard)
            self._shard = None


class _Shard:
    """One tar on its way, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self.temporary = draft_of(path)
        self._file = _HashedFile(self.temporary)
        self._zip = None
        if path.name.endswith(".gz"):  # no name and no time in its header: they would make equal data differ in bytes
            self._zip = gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=self._file, mtime=0)
        self._tar = tar_writer(self._zip or self._file)

    def add(self, key: str, data: bytes, extension: str, label: int) -> None:
        self._tar.write({"__key__": key, extension: data, "cls": str(label).encode()})
        self.samples += 1

    def finish(self) -> ShardInfo:
        self._close()
        return ShardInfo(samples=self.samples, bytes=self._file.written, sha256=self._file.hash.hexdigest())

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk is a usual reason to be here
            self._close()
        self.temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        try:
            self._tar.close()
            if self._zip is not None:
                self._zip.close()
        finally:
            self._file.close()


class _HashedFile:
    """A write-only file that knows its size and sha256."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self.hash, self.written = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.written += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()


def new_folders(folder: Path) -> list[Path]:
    """Those of a folder and the ones above it that are not there yet, innermost first."""
    return [p for p in (folder, *folder.parents) if not p.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove_drafts(folder: Path) -> None:
    """What a writer that was killed left behind. For the holder of the lock."""
    for draft in (*folder.glob(".shard-*.tmp"), *folder.glob(f".{FILE_NAME}.*.tmp")):
        draft.unlink(missing_ok=True)


def remove_dataset(folder: Path) -> None:
    """Remove a data set, if there is one.

    The manifest goes first, then its shards: a crash in between leaves no data set rather than half of one.
    """
    names = _list_shards(folder)
    (folder / FILE_NAME).unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _list_shards(folder: Path) -> list[str]:
    """Of the data set in a folder, by its manifest or, where that is damaged, by their names; none if there is no set.

    Raises DataError for a whole manifest.json of something else.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    try:
        return list(Manifest.load(folder).shards)
    except DataError as err:
        if isinstance(err.__cause__, json.JSONDecodeError):
            return [p.name for p in folder.glob("shard-[0-9]*.tar*")]
        raise

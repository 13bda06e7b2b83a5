"""Where each sample of a tar lies: one walk over the headers, so that any sample is one `pread` away.

Only image and `.cls` fields are known. Everything else is refused here, before a byte of it is interpreted: pickled
fields (`.pyd`, `.pkl`, `.pth`, `.npy` ...) run code when they are decoded.
"""

import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from poisonshield.data.decode import IMAGE_EXTENSIONS
from poisonshield.data.manifest import Manifest
from poisonshield.errors import DataError
from poisonshield.plain import plain

PICKLED = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "joblib", "dill", "ckpt", "bin"})


@dataclass(frozen=True)
class Index:
    """Samples of one shard or several, in file order; arrays are int64 [N].

    shard: number of the shard in the manifest. offset, length: bytes of the encoded image within the (plain) tar.
    codec: position in IMAGE_EXTENSIONS.
    """

    keys: tuple[str, ...]
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    codec: np.ndarray

    ARRAYS = ("labels", "shard", "offset", "length", "codec")

    @classmethod
    def join(cls, parts: list["Index"]) -> "Index":
        """All samples of the parts, in order."""
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.ARRAYS}
        return cls(keys=tuple(k for p in parts for k in p.keys), **arrays)

    def take(self, rows: np.ndarray) -> "Index":
        """Some of the samples, int64 [B], in that order."""
        arrays = {name: getattr(self, name)[rows] for name in self.ARRAYS}
        return Index(keys=tuple(self.keys[i] for i in rows.tolist()), **arrays)

    def save(self, path: Path, *, stamp: str) -> None:
        """Write whole or not at all; `stamp` says which files it belongs to. Several processes may save at once."""
        temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        keys = np.frombuffer("\n".join(self.keys).encode(), np.uint8)
        try:
            with open(temporary, "wb") as f:
                np.savez(f, keys=keys, stamp=np.array(stamp), **{name: getattr(self, name) for name in self.ARRAYS})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, *, stamp: str) -> "Index | None":
        """The saved index, or None if there is none, it is damaged, or its stamp differs."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                if str(saved["stamp"]) != stamp:
                    return None
                keys = tuple(saved["keys"].tobytes().decode().split("\n"))
                return cls(keys=keys, **{name: saved[name] for name in cls.ARRAYS})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def fits(self, manifest: Manifest, room: list[int]) -> bool:
        """Whether this can be the index of a data set. room: how many bytes the tar of each shard has."""
        count, arrays = len(self.keys), [getattr(self, name) for name in self.ARRAYS]
        if count != manifest.samples or len(set(self.keys)) != count:
            return False
        if any(a.dtype != np.int64 or a.shape != (count,) or a.min(initial=0) < 0 for a in arrays):
            return False
        if self.labels.max() >= len(manifest.classes) or self.codec.max() >= len(IMAGE_EXTENSIONS):
            return False
        if np.bincount(self.shard).tolist() != [info.samples for info in manifest.shards.values()]:
            return False
        return bool((self.length <= np.array(room)[self.shard] - self.offset).all())


def split_name(name: str) -> tuple[str, str]:
    """('a/b', 'jpg') for 'a/b.jpg': the key ends at the first dot of the file name, as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, field.lower()


def refuse_field(field: str, *, key: str, shard: str) -> None:
    """Raise DataError for every field that is neither an image nor `cls`."""
    where = plain(f"field .{field} of sample {key} in {shard}")
    if field.rpartition(".")[2] in PICKLED:
        raise DataError(
            f"{where} is a pickled or binary object, only images (.jpg, .png) and .cls are read.\n"
            "  Decoding it could run code from whoever made the shard. Leave the field out and write the shard again."
        )
    if field != "cls" and field not in IMAGE_EXTENSIONS:
        raise DataError(
            f"{where} is not known: fields are .jpg, .jpeg or .png, and .cls (keys have no dots).\n"
            "  Write the shard again without it, or with dots in its keys replaced."
        )


def parse_label(text: bytes, *, classes: int, key: str, shard: str) -> int:
    """The integer in a `.cls` field. Raises DataError if it is none, or no class has it."""
    digits = text.strip()
    if not digits.isdigit() or len(digits) > 9 or int(digits) >= classes:
        shown = digits[:20].decode(errors="replace")
        raise DataError(
            f"sample {plain(key)} in {shard} has label {shown!r}, a number from 0 to {classes - 1} was wanted.\n"
            f"  The manifest names {classes} classes: correct the .cls file or the class list, and import again."
        )
    return int(digits)


def index_tar(stream: Any, *, number: int, name: str, classes: int, faults: list[DataError] | None = None) -> Index:
    """The samples of one plain tar, one in about 25 us. stream: a binary file or a map of one.

    Raises DataError naming shard and key at the first fault.

    faults: a list that takes all of them instead; the index then holds the samples that have none.
    """
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    refused: set[str] = set()

    def refuse(key: str, fault: DataError) -> None:
        if faults is None:
            raise fault
        faults.append(fault)
        refused.add(key)

    def take(member: tarfile.TarInfo, key: str, field: str) -> None:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{plain(member.name)} in {name} is a link or a device, not a plain file. Write it again.")
        refuse_field(field, key=key, shard=name)
        if key in (labels if field == "cls" else images):
            raise _twice(key, name)
        if field == "cls":
            stream.seek(member.offset_data)
            labels[key] = parse_label(stream.read(min(member.size, 64)), classes=classes, key=key, shard=name)
        else:
            images[key] = (member.offset_data, member.size, IMAGE_EXTENSIONS.index(field))

    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if not member.isdir():
                key, field = split_name(member.name)
                try:
                    take(member, key, field)
                except DataError as fault:
                    refuse(key, fault)
            forget_members(tar)
    if lonely := sorted((images.keys() ^ labels.keys()) - refused):
        missing = "no .cls label" if lonely[0] in images else "no image"
        words = f"sample {plain(lonely[0])} in {name} has {missing} ({len(lonely)} such). Write the shard again."
        refuse(lonely[0], DataError(words))
        refused.update(lonely)
    for key in images:
        if key not in refused and ("." in key or not key.isprintable()):
            words = f"sample {key!r} in {name}: keys have no dots and no control characters. Import it again."
            refuse(key, DataError(words))
    images = {key: place for key, place in images.items() if key not in refused}
    table = np.array(list(images.values()), dtype=np.int64).reshape(-1, 3)
    return Index(
        keys=tuple(images),
        labels=np.array([labels[k] for k in images], dtype=np.int64),
        shard=np.full(len(images), number, dtype=np.int64),
        offset=table[:, 0].copy(),
        length=table[:, 1].copy(),
        codec=table[:, 2].copy(),
    )


def forget_members(tar: tarfile.TarFile) -> None:
    """Drop the headers that tarfile keeps of a tar while it is walked, a kilobyte each."""
    tar.members.clear()  # type: ignore[attr-defined]  # an attribute that typeshed does not list


def _twice(key: str, shard: str) -> DataError:
    return DataError(
        f"sample {plain(key)} appears twice, the second time in {shard}; keys must be unique in a data set.\n"
        "  Import the images again: poisonshield data import makes unique keys."
    )


def refuse_repeated_keys(keys: tuple[str, ...], shard_of: np.ndarray, names: list[str]) -> None:
    """Raise DataError naming the first key that two shards share."""
    for fault in repeated_keys(keys, shard_of, names):
        raise fault


def repeated_keys(keys: tuple[str, ...], shard_of: np.ndarray, names: list[str]) -> Iterator[DataError]:
    """One DataError for each key that came before, with the shard where it comes again."""
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        for position, key in enumerate(keys):
            if key in seen:
                yield _twice(key, names[shard_of[position]])
            seen.add(key)

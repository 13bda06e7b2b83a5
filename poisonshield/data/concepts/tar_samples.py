"""Samples of concepts from WebDataset tars, held in memory, and so within bounds that a small file cannot break.

A compressed tar of some kilobytes can unpack to any size: its members are measured before they are read.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from poisonshield.data.concepts.layout import CAPTIONS, FORMS, HIDDEN, NO_PHOTO, OTHER, Sample, about_picture
from poisonshield.data.masks import is_mask_folder, sort_masks
from poisonshield.data.pictures import is_picture
from poisonshield.data.summary import Summary
from poisonshield.data.tars import file_in
from poisonshield.errors import DataError

MAX_MEMBER = 2**28
"""Bytes of one file in a tar: 256 MiB."""
MAX_TAR = 2**31
"""Bytes of all that a tar unpacks to: 2 GiB."""

_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""What opens a compressed tar, by its first bytes."""


def in_tars(tars: Sequence[Path], summary: Summary) -> dict[str, list[Sample]]:
    """The samples of WebDataset tars by the concept that their JSON names, else by the folder in their key.

    summary: told what is not taken. Raises DataError for a tar that is damaged, or larger than the limits above.
    """
    found: dict[str, list[Sample]] = {}
    for tar in tars:
        files = _read_tar(tar, summary)
        photos, masks = sort_masks(path for path in files if is_picture(path.name))
        _refuse_several(photos, tar)
        mask_of = _match_masks(photos, masks, tar, summary)
        texts = {path for path in files if not is_picture(path.name)}
        for photo in photos:
            key = photo.with_suffix("")
            beside = {end: key.with_name(key.name + end) for end in (".json", *CAPTIONS)}
            read = {end: files[path] for end, path in beside.items() if path in texts}
            texts -= set(beside.values())
            name, mask = f"{photo} in {tar}", mask_of.get(photo)
            about = about_picture(read, str(photo), summary)
            concept = about.get("concept") or key.parent.name or tar.name.partition(".")[0]
            if any(key.name == other.stem for other in found.setdefault(concept, [])):
                raise DataError(f"{name}: concept {concept} has a picture {key.name} already. Rename one of them.")
            found[concept].append(
                Sample(key.name, name, files[photo], None if mask is None else files[mask], f"{mask} in {tar}", about)
            )
        for path in sorted(texts):
            summary.leave_out(f"texts {NO_PHOTO}", f"{path} in {tar.name}")
    if not any(found.values()):
        raise DataError(f"{' and '.join(map(str, tars))} holds no picture.\n{FORMS}")
    return dict(sorted(found.items()))


def _refuse_several(photos: Sequence[PurePosixPath], tar: Path) -> None:
    """Raise DataError for two pictures of one key, and for a name of which it is not clear where the key ends."""
    keys: dict[PurePosixPath, PurePosixPath] = {}
    for photo in photos:
        key = photo.with_suffix("")
        if "." in key.name:
            raise DataError(
                f"{photo} in {tar}: a key ends at its first dot, and {photo.name.partition('.')[2]} is no picture and "
                f"no mask.\n  Take the other dots out of the name, if it is a picture of its own.\n{FORMS}"
            )
        if key in keys:
            raise DataError(f"sample {key} in {tar} has 2 pictures, one is wanted: {keys[key]} and {photo}.\n{FORMS}")
        keys[key] = photo


def _match_masks(
    photos: Sequence[PurePosixPath], masks: Mapping[PurePosixPath, str], tar: Path, summary: Summary
) -> dict[PurePosixPath, PurePosixPath]:
    """The mask of each photo that has one: beside it, or in a folder of masks within its folder or beside it."""
    found: dict[PurePosixPath, PurePosixPath] = {}
    for mask, stem in masks.items():
        home = next((p.parent for p in reversed(mask.parents) if is_mask_folder(p.name)), mask.parent)
        near = [p for p in photos if p.stem == stem and p.is_relative_to(home)]
        exact = [p for p in near if p.parent == home] or near
        if not exact:
            summary.leave_out(f"masks {NO_PHOTO}", f"{mask} in {tar.name}")
        elif len(exact) > 1 or exact[0] in found:
            raise DataError(f"{mask} in {tar}: which photo does it mask, and is it the only one? Rename one of them.")
        else:
            found[exact[0]] = mask
    return found


def _lower_ending(name: PurePosixPath) -> PurePosixPath:
    return name.with_suffix(name.suffix.lower()) if name.name else name


def _read_tar(path: Path, summary: Summary) -> dict[PurePosixPath, bytes]:
    """Pictures, JSONs and captions by their names. A tar that is cut or damaged is an error, in headers too."""
    found: dict[PurePosixPath, bytes] = {}
    try:
        with _unpack(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = _lower_ending(PurePosixPath(member.name))
                if not member.isfile() or _tell_if_hidden(name, summary):
                    continue
                if name in found:
                    raise tarfile.ReadError(f"{member.name} is in it twice")
                if not is_picture(name.name) and name.suffix not in (".json", *CAPTIONS):
                    summary.leave_out(OTHER, f"{name} in {path.name}")
                    continue
                if member.size > MAX_MEMBER:
                    raise DataError(
                        f"{member.name} in {path} has {member.size:,} bytes, and {MAX_MEMBER:,} are the most that is "
                        "read of one file. Leave it out, or make it smaller."
                    )
                found[name] = file_in(tar, member)
            # tarfile takes a damaged header for the end and says nothing; the true end is a block of zeros
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a damaged header, or no end mark")
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as err:
        raise DataError(f"{path} cannot be read as a tar ({err}). Copy it again from its source.\n{FORMS}") from err
    if not found:
        raise DataError(f"{path} holds no sample.\n{FORMS}")
    return found


def _tell_if_hidden(name: PurePosixPath, summary: Summary) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    if hidden:
        summary.leave_out(HIDDEN, str(name))
    return hidden


@contextmanager
def _unpack(path: Path) -> Iterator[Any]:
    """The tar's own bytes, within the limits."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        opener = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
        if opener is None:
            yield file
            return
        with opener(file) as unpacked:
            yield _Bounded(unpacked, path)


class _Bounded:
    """A stream that gives no more than the limits allow, at once and in all: headers too can claim any size."""

    def __init__(self, stream: Any, path: Path) -> None:
        self.stream, self.path = stream, path

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise tarfile.ReadError(f"a part claims {size:,} bytes, {MAX_MEMBER:,} at most are read at once")
        self._check(self.tell() + size)
        return self.stream.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        self._check(place)
        return self.stream.seek(place, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def _check(self, end: int) -> None:
        if end > MAX_TAR:
            raise DataError(
                f"{self.path} unpacks to more than {MAX_TAR:,} bytes, the most that is read of one tar.\n"
                "  Part it, or give the pictures in folders."
            )

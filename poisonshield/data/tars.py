"""The door to webdataset: writing one tar, and reading tars that others made. Nothing else imports it."""

import gzip
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from poisonshield.data.decode import IMAGE_EXTENSIONS
from poisonshield.data.index import forget_members, split_name
from poisonshield.data.pictures import is_hidden, is_picture
from poisonshield.errors import DataError
from poisonshield.plain import plain

MAX_TEXT = 2**22
"""Bytes of a file that is no image, such as a label, and of what tar stores about a file."""


def tar_writer(file: Any) -> Any:
    """webdataset's TarWriter with everything fixed that would make equal samples differ in bytes (time, owner)."""
    from webdataset import TarWriter

    # pax headers appear only for names that plain ustar cannot hold: long ones, and letters beyond ASCII
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False, format="PAX_FORMAT")


def read_groups(
    path: Path, *, wanted: Callable[[str], bool], left_out: Counter[str], max_member: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {field: bytes}) of the files of each key in a .tar or .tar.gz that follow each other.

    wanted: whether a field is read; others are never read, only counted in `left_out`, as hidden files are. max_member:
    bytes of an image file; of other fields MAX_TEXT. Raises DataError naming the tar if it is damaged or cut off, or
    holds a link or a file beyond the bound.
    """
    from webdataset.tariterators import group_by_keys

    opener = gzip.open if path.name.lower().endswith("gz") else open
    key = ""
    try:
        with opener(path, "rb") as stream:
            for sample in group_by_keys(_files(stream, path, wanted, left_out, max_member), keys=split_name):
                key = sample.pop("__key__")
                yield key, {field: data for field, data in sample.items() if not field.startswith("__")}
            while stream.read(2**20):  # to the end, where gzip compares its checksum
                pass
    except DataError:
        raise
    except Exception as err:  # webdataset re-raises tarfile, gzip and its own errors in several types
        where, why = f" after sample {key}" if key else "", err.args[0] if err.args else type(err).__name__
        raise DataError(
            plain(f"{path} cannot be read as a tar{where}: {why}") + "\n  Copy it again from its source."
        ) from err


def read_tar(path: Path, *, left_out: Counter[str]) -> Iterator[tuple[str, str, bytes, bytes | None]]:
    """(key, extension, image bytes, .cls bytes or None) of each sample of a tar of own form.

    Other fields are never read, only counted in `left_out`. Raises as read_groups does, and for two images of a sample;
    samples without an image are counted under "no image".
    """
    own = ("cls", *IMAGE_EXTENSIONS)
    for key, fields in read_groups(path, wanted=own.__contains__, left_out=left_out, max_member=2**30):
        images = [e for e in IMAGE_EXTENSIONS if e in fields]
        if len(images) > 1:
            raise DataError(f"sample {plain(key)} in {path} has {len(images)} images, one was wanted. Split it.")
        if not images:
            left_out["no image"] += 1
            continue
        yield key, images[0], fields[images[0]], fields.get("cls")


def file_in(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a plain file in an open tar. Raises tarfile.ReadError for a member that is none."""
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is not a plain file")
    return file.read()


class _StrictHeader(tarfile.TarInfo):
    """A header that is cut or damaged is an error. tarfile takes it for the end of the tar, and the rest would be lost
    without a word: webdataset's own reader, which stands on it, loses it too."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            header = super().frombuf(buf, encoding, errors)
            if (
                header.type not in tarfile.REGULAR_TYPES and header.size > MAX_TEXT
            ):  # read whole, before anybody is asked
                raise tarfile.ReadError(f"a header of {header.size:,} bytes, {MAX_TEXT:,} at most were wanted")
            return header
        except tarfile.HeaderError as err:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark at the end
                raise
            raise tarfile.ReadError(f"{err}, where a file or the end mark was wanted") from err


def _files(
    stream: Any, path: Path, wanted: Callable[[str], bool], left_out: Counter[str], max_member: int
) -> Iterator[dict[str, Any]]:
    """The files of a tar that are read, as webdataset's grouping takes them."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
        for member in tar:
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                field = split_name(member.name)[1]
                if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
                    left_out["hidden files"] += 1
                elif wanted(field):
                    _refuse_large(member, path, max_member if is_picture(member.name) else min(MAX_TEXT, max_member))
                    yield {"fname": member.name, "data": file_in(tar, member), "__url__": str(path)}
                else:
                    left_out[f".{plain(field)}"] += 1
            elif not member.isdir():
                raise DataError(
                    f"{plain(member.name)} in {path} is a link or a device, not a plain file. Write it again."
                )
            forget_members(tar)


def _refuse_large(member: tarfile.TarInfo, path: Path, most: int) -> None:
    if member.size > most:
        raise DataError(
            f"{plain(member.name)} in {path} has {member.size / 2**20:,.0f} MiB, {most / 2**20:,.0f} MiB at most were "
            "wanted; it was not read.\n  Leave it out, or say how large an image file may be: --max-member-mib"
        )
    if member.sparse is not None:
        raise DataError(f"{plain(member.name)} in {path} is stored with holes, not as a plain file. Write it again.")

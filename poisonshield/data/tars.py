"""The door to webdataset: writing one tar, and reading tars that others made. Nothing else imports it."""

import gzip
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from poisonshield.data.decode import IMAGE_EXTENSIONS
from poisonshield.data.index import forget_members, split_name
from poisonshield.errors import DataError


def tar_writer(file: Any) -> Any:
    """webdataset's TarWriter with everything fixed that would make equal samples differ in bytes (time, owner)."""
    from webdataset import TarWriter

    # pax headers appear only for names that plain ustar cannot hold: long ones, and letters beyond ASCII
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False, format="PAX_FORMAT")


def read_tar(path: Path, *, left_out: Counter[str]) -> Iterator[tuple[str, str, bytes, bytes | None]]:
    """(key, extension, image bytes, .cls bytes or None) of each sample of a .tar or .tar.gz.

    Other fields are never read, only counted in `left_out`. Raises DataError naming the tar if it is damaged or cut
    off, holds a link, or a sample has two images; samples without an image are counted under "no image".
    """
    from webdataset.tariterators import group_by_keys

    opener = gzip.open if path.name.endswith(("gz",)) else open
    key = ""
    try:
        with opener(path, "rb") as stream:
            for sample in group_by_keys(_files(stream, path, left_out), keys=split_name):
                key = sample["__key__"]
                images = [e for e in IMAGE_EXTENSIONS if e in sample]
                if len(images) > 1:
                    raise DataError(f"sample {key} in {path} has {len(images)} images, one was wanted. Split it.")
                if not images:
                    left_out["no image"] += 1
                    continue
                yield key, images[0], sample[images[0]], sample.get("cls")
            while stream.read(2**20):  # to the end, where gzip compares its checksum
                pass
    except DataError:
        raise
    except Exception as err:  # webdataset re-raises tarfile, gzip and its own errors in several types
        where, why = f" after sample {key}" if key else "", err.args[0] if err.args else type(err).__name__
        raise DataError(f"{path} cannot be read as a tar{where}: {why}\n  Copy it again from its source.") from err


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
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as err:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark at the end
                raise
            raise tarfile.ReadError(f"{err}, where a file or the end mark was wanted") from err


def _files(stream: Any, path: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """The image and `.cls` files of a tar, as webdataset's grouping takes them."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
        for member in tar:
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                field = split_name(member.name)[1]
                if field == "cls" or field in IMAGE_EXTENSIONS:
                    yield {"fname": member.name, "data": file_in(tar, member), "__url__": str(path)}
                else:
                    left_out["." + field] += 1
            elif not member.isdir():
                raise DataError(f"{member.name} in {path} is a link or a device, not a plain file. Write it again.")
            forget_members(tar)

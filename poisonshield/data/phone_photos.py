"""HEIC and AVIF, as phones write photos: read where a package for them is installed, else refused with the way out.

HEIC is read by pillow-heif, an extra of this package; AVIF by Pillow itself, where it was built with it.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from poisonshield.errors import DataError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_KINDS = {
    b"avif": "AVIF", b"avis": "AVIF",
    b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC", b"heis": "HEIC",
    b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip


def kind_of(data: bytes) -> str:
    """ "HEIC", "AVIF", or "" for any other file, by its first bytes."""
    if data[4:8] != b"ftyp":
        return ""
    kind = _KINDS.get(data[8:12], "")
    length = min(int.from_bytes(data[:4], "big"), 256)
    if kind == "HEIC" and b"avif" in data[16:length]:  # the general brand first, the codec's own among the others
        return "AVIF"
    return kind


def pillow_format(kind: str) -> str | None:
    """Pillow's name of the format of a kind, ready to be opened; None where nothing installed reads it."""
    if kind == "AVIF":
        from PIL import features

        return "AVIF" if "avif" in features.modules and features.check("avif") else None
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return None
    register_heif_opener()
    return "HEIF"


def refusal(name: str, kind: str, *, wanted: str, reason: str = "") -> DataError:
    """The error for a photo that is not read. reason: why not, where a reader tried."""
    came = f"{name} is a {kind} file" + (f" that cannot be read ({reason})" if reason else "")
    reader = "pip install pillow-heif" if kind == "HEIC" else "pip install --upgrade pillow"
    install = "" if reason else f" Or install its reader: {reader}"
    return DataError(
        f"{came}, one of {wanted} was wanted.\n"
        f"  Export it as PNG, or as JPEG of high quality, and give that file.{install}"
    )


def depth(file: "ImageFile", data: bytes) -> int:
    """Bits a channel of an open HEIC or AVIF file. Their readers cut to 8 without a word."""
    found = file.info.get("bit_depth")
    if isinstance(found, int):
        return found
    at = data.find(b"av1C")  # AV1's configuration: the third byte holds the depth
    return 10 if at >= 0 and data[at + 6 : at + 7] and data[at + 6] & 0x40 else 8


def missed_turn(file: "ImageFile", data: bytes) -> int:
    """The orientation, 1 to 8, that EXIF asks for and the reader of HEIC left undone; 1 if nothing is left to do.

    A HEIC file of a phone says its turn twice: as a property, which the reader follows, and in EXIF, which the reader
    then sets to 1. Where only EXIF says it, nobody has turned the pixels.
    """
    asked = file.info.get("original_orientation")
    if (
        not isinstance(asked, int)
        or asked not in range(2, 9)
        or any(mark in box for box in _meta_boxes(data) for mark in (b"irot", b"imir"))
    ):
        return 1
    return asked


def _meta_boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + length if length else len(data)
        if kind == b"meta":
            yield data[at:end]
        at = max(end, at + 8)

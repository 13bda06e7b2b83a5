"""The one door to picture files and masks: which files are pictures, and reading one strictly.

Only the formats below are ever tried, so that no other plugin of Pillow sees a stranger's file: its PostScript reader,
for one, starts a program. A picture is turned as its EXIF data says: on its side it is another picture to a network and
its mask does not fit. What cannot be read whole and at full depth is refused in words, not repaired.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from poisonshield.data import phone_photos
from poisonshield.errors import DataError

if TYPE_CHECKING:
    from PIL import Image, TiffImagePlugin
    from PIL.ImageFile import ImageFile

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm"),
}
"""What is read, by Pillow's names, with the endings of each. Of an animation, or of several pages, the first."""

UNREAD = (".heic", ".heif", ".avif")
"""Endings of photos that are read only where a package for them is installed (data/phone_photos.py). They count as
pictures, so that they are refused by name and not passed over."""

ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings) | frozenset(UNREAD)

MAX_PIXELS = 2**27
"""Of one picture: 134 million, 400 MB once decoded. A file of some bytes can claim any size."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_ORIENTATION = 0x0112  # the EXIF tag
JUNK = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})
"""Names that systems put beside files of people. They count as hidden, as all that begin with a dot do."""


@dataclass(frozen=True)
class Picture:
    """A picture that was read: `image` is Pillow's, in the file's own mode and upright.

    format: one of FORMATS, or MPO, a JPEG with more pictures behind the first, as phones write it, or HEIF or AVIF.
    frames: how many pictures the file holds.
    """

    image: "Image.Image"
    format: str
    frames: int

    @property
    def alpha(self) -> "Image.Image | None":
        """The alpha channel in 8 bits, or None if nothing in the file speaks of transparency."""
        return self.image.convert("RGBA").getchannel("A") if self._transparent else None

    @property
    def rgb(self) -> "Image.Image":
        """The colours as they are stored, under transparent pixels too; grey is repeated."""
        return (self.image.convert("RGBA") if self._transparent else self.image).convert("RGB")

    @property
    def pixels(self) -> Tensor:
        """The colours as uint8 [3, H, W]."""
        return torch.from_numpy(np.array(self.rgb)).permute(2, 0, 1).contiguous()

    @property
    def _transparent(self) -> bool:
        return "A" in self.image.getbands() or "transparency" in self.image.info


@dataclass(frozen=True)
class Head:
    """What a file says before it is decoded. orientation: EXIF's, 1 to 8; 1 is upright. pixels: height times width."""

    format: str
    orientation: int
    pixels: int = 0


def is_picture(name: str | Path) -> bool:
    """Whether a file is a picture by its ending."""
    return Path(name).suffix.lower() in ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name: it begins with a dot, or a system made it."""
    return name.startswith(".") or name in JUNK


def _refuse_folder(err: OSError) -> None:
    raise DataError(f"{err.filename} cannot be read: {err.strerror}. Make it readable, or move it away.") from err


def walk_files(folder: Path, *, passed_over: list[Path] | None = None) -> list[Path]:
    """All files below a folder, sorted; hidden ones and hidden folders are left out, links to folders not followed.

    passed_over: a list that takes the paths of what was left out, folders as a whole, and pipes and dead links.
    """
    found: list[Path] = []
    left: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=_refuse_folder):
        left += [Path(here, name) for name in folders if is_hidden(name) or Path(here, name).is_symlink()]
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = Path(here, name)
            (left if is_hidden(name) or not path.is_file() else found).append(path)
    if passed_over is not None:
        passed_over += sorted(left)
    return sorted(found)


def find_pictures(folder: Path, *, nested: bool = True) -> list[Path]:
    """The pictures of a folder by their endings, sorted, hidden ones left out. nested: also those in folders below."""
    if nested:
        return [path for path in walk_files(folder) if is_picture(path)]
    return sorted(p for p in folder.iterdir() if is_picture(p) and p.is_file() and not is_hidden(p.name))


def read_picture(
    source: Path | bytes,
    *,
    name: str | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> Picture:
    """The picture in a file or in its bytes. name: how errors call it, the path if None.

    upright: turned as its EXIF data says; False leaves pixels as they are stored, but for TIFF, which Pillow turns.

    Raises DataError for a file that is missing, damaged, of none of the formats, larger than max_pixels, or deeper than
    8 bits a channel. Beyond 178 million pixels Pillow itself refuses, whatever max_pixels says.
    """
    from PIL import ImageOps

    data = file_bytes(source)
    called = name or str(source if isinstance(source, Path) else "the picture")
    with _open_file(data, name=called, formats=formats, max_pixels=max_pixels) as file:
        frames = getattr(file, "n_frames", 1)
        turned = ImageOps.exif_transpose(file) if upright and _orientation(file) != 1 else file.copy()
        return Picture(turned, file.format or "", frames)


def read_head(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Head:
    """Format and orientation, without decoding. Raises as read_picture does, as far as the head of the file tells."""
    with _open_file(data, name=name, formats=tuple(FORMATS), max_pixels=max_pixels) as file:
        return Head(file.format or "", _orientation(file), file.width * file.height)


def turn(pixels: Tensor, orientation: int) -> Tensor:
    """pixels [..., H, W] as EXIF's orientation, 1 to 8, says that they are to be shown."""
    if orientation >= 5:  # stored with rows for columns
        pixels = pixels.transpose(-1, -2)
    sides = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation, ())
    return pixels.flip(sides).contiguous()


def refuse_large(width: int, height: int, *, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError for more pixels than max_pixels."""
    if width * height > max_pixels:
        raise DataError(
            f"{name} claims {width}x{height} pixels, {max_pixels:,} pixels at most were wanted; it was not decoded.\n"
            "  Make it smaller first, or leave it out: a small file that claims so many may be made to fill the memory."
        )


def damage_error(data: bytes, err: Exception | str, *, name: str, kind: str = "") -> DataError:
    """The error for bytes that are no whole picture. kind: such as "PNG ", where that is known."""
    return DataError(
        f"{name}: {len(data)} bytes are not a whole {kind}image ({_first_line(err)}).\n"
        "  Restore the file from its source, or leave it out (poisonshield data import: --skip-broken)."
    )


def depth_error(name: str, what: str) -> DataError:
    """The error for more than 8 bits a channel."""
    return DataError(
        f"{name} has more than 8 bits a channel ({what}), 8 were wanted.\n"
        "  Convert it first: budgets are stated for 256 levels."
    )


def file_bytes(source: Path | bytes) -> bytes:
    """The bytes of a file, or those given. Raises DataError for a file that cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as err:
        raise DataError(f"{source} cannot be read: {err.strerror}. Give the path of a picture file.") from err


@contextmanager
def _open_file(data: bytes, *, name: str, formats: Sequence[str], max_pixels: int) -> Iterator["ImageFile"]:
    """Pillow's open file, within limits and depth. What its codecs raise inside the block becomes a DataError."""
    from PIL import Image, UnidentifiedImageError

    kind, wanted = f"{formats[0]} " if len(formats) == 1 else "", ", ".join(FORMATS)
    photo = phone_photos.kind_of(data)
    if photo:
        extra = phone_photos.pillow_format(photo) if tuple(formats) == tuple(FORMATS) else None
        if extra is None:
            raise phone_photos.refusal(name, photo, wanted=wanted)
        formats = (extra,)
    try:
        with Image.open(io.BytesIO(data), formats=tuple(formats)) as file:
            kind = f"{file.format} "
            refuse_large(*file.size, name=name, max_pixels=max_pixels)
            _refuse_empty_claim(data, name)
            if deep := _depth(data, file):
                raise depth_error(name, deep)
            if photo == "HEIC" and (missed := phone_photos.missed_turn(file, data)) != 1:
                file.getexif()[_ORIENTATION] = missed
            yield file
    except DataError:
        raise
    except Image.DecompressionBombError as err:
        raise DataError(f"{name} is too large: {err}.\n  Make it smaller first, or leave it out.") from err
    except _CODEC_ERRORS as err:
        if photo:
            raise phone_photos.refusal(name, photo, wanted=wanted, reason=_first_line(err)) from err
        if isinstance(err, UnidentifiedImageError):
            reason = "it begins as none, or ends too early" if data else "it is empty"
            raise damage_error(data, reason, name=name, kind=f"{_either(formats)} ") from err
        raise damage_error(data, err, name=name, kind=kind) from err


_CODEC_ERRORS = (
    OSError, RuntimeError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow's codecs raise for damaged files, each its own."""


def _orientation(file: "Image.Image") -> int:
    try:
        found = file.getexif().get(_ORIENTATION, 1)
    except _CODEC_ERRORS:  # cameras write broken EXIF data around whole pictures
        return 1
    return found if found in range(1, 9) else 1


_DEFLATED = 1032
"""The most bytes that one byte of a deflate stream unpacks to."""


def _refuse_empty_claim(data: bytes, name: str) -> None:
    """Raise DataError for a PNG of more pixels than its bytes can hold: the decoder takes memory for all of them."""
    if not data.startswith(PNG_SIGNATURE):
        return
    width, height = struct.unpack(">II", data[16:24])
    bits = data[24] * {2: 3, 4: 2, 6: 4}.get(data[25], 1)
    if height * (width * bits // 8) > _DEFLATED * len(data):
        raise damage_error(data, f"so few cannot hold {width}x{height} pixels", name=name, kind="PNG ")


def _depth(data: bytes, file: "ImageFile") -> str:
    """What shows that a file has more than 8 bits a channel, or "". Pillow may cut colours to 8 bits without a word."""
    if file.mode[:1] in "IF":
        return f"mode {file.mode}"
    deepest = phone_photos.depth(file, data) if file.format in ("HEIF", "AVIF") else 8
    if data.startswith(PNG_SIGNATURE):
        deepest = data[24]
    elif file.format == "TIFF":
        deepest = max(cast("TiffImagePlugin.TiffImageFile", file).tag_v2.get(258, (8,)))
    elif file.format == "PPM":
        brightest = file.tile[0].args  # of the decoder's settings, the last, where it is not 255
        deepest = 16 if isinstance(brightest, tuple) and brightest[-1] > 255 else 8
    return f"{deepest} bits" if deepest > 8 else ""


def _first_line(err: Exception | str) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def _either(formats: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))

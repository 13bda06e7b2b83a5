"""Photographs as files: read whole, known by their stem, with masks beside them; and what is written about them."""

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.concepts.layout import HIDDEN, OTHER
from poisonshield.data.masks import read_mask, sort_masks
from poisonshield.data.pictures import FORMATS, file_bytes, is_picture, read_picture
from poisonshield.data.summary import Summary
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import tell_of_disk, write_whole

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Photo:
    """A picture file, turned as its EXIF data says: pixels uint8 [3, H, W], alpha and colour profile as they are."""

    path: Path
    out: Path
    pixels: Tensor
    alpha: "Image.Image | None"
    profile: bytes | None
    sha256: str

    @property
    def key(self) -> str:
        """What random numbers go by: the stem, whatever folder the file is in."""
        return self.path.stem


def read_photo(path: Path, out: Path, *, format: str | None = None) -> Photo:
    """A picture file. Raises DataError as read_picture does, and for animations and CMYK."""
    data = file_bytes(path)
    picture = read_picture(data, name=str(path), formats=tuple(FORMATS) if format is None else (format,))
    image = picture.image
    if picture.frames > 1 and picture.format != "MPO":  # phones write JPEGs with further pictures in them
        raise DataError(f"{path} is an animation of {picture.frames} frames; give its frames one by one.")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise DataError(f"{path} is {image.mode}. Convert it to RGB first, since that changes its colours.")
    # A grey profile does not fit the RGB that is written.
    profile = image.info.get("icc_profile") if image.mode not in ("1", "L", "LA") else None
    return Photo(path, out, picture.pixels, picture.alpha, profile, hashlib.sha256(data).hexdigest())


def find_photos(given: Sequence[Path], summary: Summary | None = None) -> list[Path]:
    """The files given, and those of folders, sorted. summary: told what was found, and what folders hold besides.

    Raises DataError if there is none, or a name is no picture's.
    """
    summary = summary or Summary("")
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found += _photos_in(path, summary)
        elif not path.is_file():
            raise DataError(f"{path} does not exist. Give picture files, or folders of them.")
        elif not is_picture(path):
            raise DataError(f"{path} is no picture by its name: {', '.join(FORMATS)} are read. Convert it first.")
        else:
            found.append(path)
    if not found:
        told = "".join(f"\n  {line}" for line in summary.lines()) if summary.left_out else ""
        raise DataError(
            f"no pictures in {', '.join(map(str, given)) or 'an empty list'}. Give files or folders of them.{told}"
        )
    summary.take("photos", len(found))
    return found


def _photos_in(folder: Path, summary: Summary) -> list[Path]:
    """The photos that lie in a folder itself."""
    pictures = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            summary.leave_out(HIDDEN, path.name)
        elif path.is_dir():
            summary.leave_out("folders within, which are not looked into", path.name)
        elif not is_picture(path) or not path.is_file():
            summary.leave_out(OTHER, path.name)
        else:
            pictures.append(path)
    photos, masks = sort_masks(path.relative_to(folder) for path in pictures)
    for mask in masks:
        summary.leave_out("masks of photos by their names", mask.name)
    return [folder / photo for photo in photos]


def refuse_among_originals(out: Path, originals: Iterable[Path], *, within: bool = True) -> None:
    """Raise ConfigError if results would lie in a folder of the originals. within: also in a folder below one.

    originals: folders, or files, whose folders are meant.
    """
    place = out.resolve()
    for given in originals:
        folder = given.resolve() if given.is_dir() else given.resolve().parent
        if place == folder or (within and given.is_dir() and folder in place.parents):
            raise ConfigError(
                f"{out} {'is' if place == folder else 'lies in'} the folder of the originals, {given}. Give another "
                "one for what is written:\n  pictures among the originals would be taken for originals later."
            )


def refuse_file(out: Path) -> None:
    """Raise ConfigError if a file lies where a folder for results is wanted."""
    if found := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise ConfigError(f"{found} is a file, and a folder is wanted for what is written. Give another name.")


def write_png(path: Path, image: "Image.Image") -> None:
    """Write a picture whole or not at all. Raises StorageError."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_whole(path, data.getvalue())


def write_drawn(path: Path, draw: Callable[[Path], object]) -> None:
    """What `draw` draws into a file of this name, written whole or not at all. Raises StorageError."""
    with tempfile.TemporaryDirectory(prefix="poisonshield-") as folder:
        drawn = Path(folder, path.name)
        with tell_of_disk(drawn):
            draw(drawn)
        write_whole(path, drawn.read_bytes())


def read_masks(photos: Sequence[Photo], given: Path | None) -> dict[str, Tensor] | None:
    """[1, H, W] in [0, 1] by key, from a file for all or a folder with `<stem>.png` or `<stem>.mask.png`, or as other
    tools call masks."""
    if given is None:
        return None
    masks = {}
    for photo in photos:
        endings = (".png", ".mask.png", "-masklabel.png", "_mask.png")
        names = [given] if not given.is_dir() else [given / f"{photo.key}{ending}" for ending in endings]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            raise DataError(f"{photo.path.name} has no mask: no {' or '.join(map(str, names))}.")
        height, width = photo.pixels.shape[1:]
        grey = read_mask(path, name=str(path), size=(width, height))
        masks[photo.key] = torch.from_numpy(np.array(grey))[None].float() / 255
    return masks

"""Photographs as files: read whole, known by their stem, with masks beside them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.masks import read_mask
from poisonshield.data.pictures import FORMATS, file_bytes, find_pictures, is_picture, read_picture
from poisonshield.errors import DataError

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


def find_photos(given: Sequence[Path]) -> list[Path]:
    """The files given, and those of folders, sorted. Raises DataError if there is none, or a name is no picture's."""
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found += find_pictures(path, nested=False)
        elif not path.is_file():
            raise DataError(f"{path} does not exist. Give picture files, or folders of them.")
        elif not is_picture(path):
            raise DataError(f"{path} is no picture by its name: {', '.join(FORMATS)} are read. Convert it first.")
        else:
            found.append(path)
    if not found:
        raise DataError(
            f"no pictures in {', '.join(map(str, given)) or 'an empty list'}. Give files or folders of them."
        )
    return found


def read_masks(photos: Sequence[Photo], given: Path | None) -> dict[str, Tensor] | None:
    """[1, H, W] in [0, 1] by key, from a file for all or a folder with `<stem>.png` or `<stem>.mask.png`."""
    if given is None:
        return None
    masks = {}
    for photo in photos:
        names = [given] if not given.is_dir() else [given / f"{photo.key}.png", given / f"{photo.key}.mask.png"]
        path = next((p for p in names if p.is_file()), None)
        if path is None:
            raise DataError(f"{photo.path.name} has no mask: {' and '.join(map(str, names))} are missing.")
        height, width = photo.pixels.shape[1:]
        grey = read_mask(path, name=str(path), size=(width, height))
        masks[photo.key] = torch.from_numpy(np.array(grey))[None].float() / 255
    return masks

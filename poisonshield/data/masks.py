"""Mask files: which file is one, and what its pixels must be. A mask says how much each pixel belongs to the concept.

Binary or 8-bit grey, as large as its picture. A mask that is silently misread spoils a run without a trace, so colours,
palettes with colours, transparency and 16 bits are refused instead of converted.
"""

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from poisonshield.data.pictures import read_picture
from poisonshield.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_WORD = re.compile(r"(?:^|[^a-z])masks?(?:[^a-z]|$)")

_WANTED = "8-bit grey or black and white is wanted. Convert it first."


def is_mask_folder(name: str) -> bool:
    """Whether a folder within a concept's holds masks: "masks", "512_masks", "SAM mask", but not "unmasked"."""
    return bool(_WORD.search(name.lower()))


def stem_of_mask(path: PurePath) -> str | None:
    """The stem of the picture that a file masks, or None if it is no mask. path: within the concept's folder.

    `<stem>.mask.png` anywhere, and any picture file in a folder of masks.
    """
    if path.stem.lower().endswith(".mask"):
        return path.stem[: -len(".mask")]
    return path.stem if any(is_mask_folder(part) for part in path.parts[:-1]) else None


def read_mask(source: Path | bytes, *, name: str, size: tuple[int, int]) -> "Image.Image":
    """The mask as a grey Pillow image, 0 (not the concept) to 255. A file of zeros and ones is taken as binary.

    Read as pictures are, and turned as its own EXIF data says. size: (width, height) of its picture. Raises DataError
    calling it `name` if it cannot be read, has another size, or is coloured, transparent, deeper than 8 bits or empty.
    """
    from PIL import Image

    image = read_picture(source, name=f"mask {name}").image
    if image.size != size:
        raise DataError(
            f"mask {name} is {image.width}x{image.height} pixels and its picture {size[0]}x{size[1]}; they must be "
            "equal.\n  Make the mask from this very file, after any rotation that its EXIF data asks for."
        )
    return Image.fromarray(_grey(image, name))


def _grey(image: "Image.Image", name: str) -> np.ndarray:
    """uint8 [H, W]."""
    if image.mode in ("1", "L"):
        grey = np.array(image.convert("L"))
    else:
        rgba = np.array(image.convert("RGBA"))
        if (rgba[..., 3] != 255).any():
            raise DataError(f"mask {name} is partly transparent, so its meaning is unclear; {_WANTED}")
        if (rgba[..., :1] != rgba[..., 1:3]).any():
            raise DataError(f"mask {name} is coloured (mode {image.mode}); {_WANTED}")
        grey = rgba[..., 0]
    refuse_empty(grey, name)
    return grey * 255 if grey.max() == 1 else grey


def refuse_empty(mask: np.ndarray, name: str) -> None:
    """Raises DataError if no pixel belongs to the concept."""
    if not mask.any():
        raise DataError(
            f"mask {name} is empty: no pixel belongs to the concept. Draw it again, or leave the picture out."
        )

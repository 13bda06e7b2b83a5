"""Mask files: which file is one, and what its pixels must be. A mask says how much each pixel belongs to the concept.

Binary or 8-bit grey, as large as its picture. A mask that is silently misread spoils a run without a trace, so colours,
palettes with colours, transparency and 16 bits are refused instead of converted.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from poisonshield.data.pictures import read_picture
from poisonshield.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

AnyPath = TypeVar("AnyPath", bound=PurePath)

_WORD = re.compile(r"(?:^|[^a-z])mask(?:s|labels?)?(?:[^a-z]|$)")
_SURE = (".mask", "-masklabel")
"""Ends of the stem that no photo has: ours, and OneTrainer's."""
_LIKELY = ("_mask", "-mask", "_masklabel")
"""Ends that a photo of a mask may have too, so they count only beside a photo that is called like the rest."""

_WANTED = "8-bit grey or black and white is wanted. Convert it first."


def is_mask_folder(name: str) -> bool:
    """Whether a folder within a concept's holds masks: "masks", "512_masks", "SAM mask", but not "unmasked"."""
    return bool(_WORD.search(name.lower()))


def sort_masks(files: Iterable[AnyPath]) -> tuple[list[AnyPath], dict[AnyPath, str]]:
    """The photos among picture files, and the masks, each with the stem of the photo that it belongs to.

    files: paths within the folder of one concept. Masks are `<stem>.mask.png` and `<stem>-masklabel.png` anywhere,
    `<stem>_mask.png` and `<stem>-mask.png` beside a photo `<stem>`, and everything in folders of masks.
    """
    files = list(files)
    beside: dict[PurePath, set[str]] = defaultdict(set)
    for path in files:
        beside[path.parent].add(path.stem)
    masks: dict[AnyPath, str] = {}
    for path in files:
        stem = _without(path.stem, _SURE)
        if stem is None and (likely := _without(path.stem, _LIKELY)) in beside[path.parent]:
            stem = likely
        if stem is not None:
            masks[path] = stem
    in_folders = [path for path in files if any(map(is_mask_folder, path.parts[:-1])) and path not in masks]
    photos = [path for path in files if path not in masks and path not in in_folders]
    stems = {path.stem for path in photos}
    for path in in_folders:
        masks[path] = path.stem if path.stem in stems else _without(path.stem, _LIKELY) or path.stem
    return photos, masks


def _without(stem: str, endings: tuple[str, ...]) -> str | None:
    """The stem without one of these at its end, None if it has none."""
    found = next((end for end in endings if stem.lower().endswith(end)), None)
    return None if found is None else stem[: -len(found)]


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

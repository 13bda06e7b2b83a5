"""Concepts from folders and tars of pictures.

Pictures are cut and resized here, once, and each mask with the same crop.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.layout import FORMS, Sample, in_folders, in_tars
from poisonshield.data.images import fit
from poisonshield.data.masks import read_mask, refuse_empty, too_deep
from poisonshield.errors import ConfigError, DataError
from poisonshield.registry import suggest

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

IN_DISTRIBUTION = ("BlackKeyboard", "CautionSign", "CokeCan", "EuroCoin", "MetalWrench")
OUT_OF_DISTRIBUTION = ("BlueElephant", "ButterflyClip", "CatPaw", "FishDoll", "MonkeySleigh")
"""NovelConcepts10 (Styborski et al. 2025): concepts that Stable Diffusion's training data shows, and that it does not."""

_GROUPS = {n.lower(): "id" for n in IN_DISTRIBUTION} | {n.lower(): "od" for n in OUT_OF_DISTRIBUTION}


def load_concepts(
    root: str | Path,
    *,
    size: int,
    names: Sequence[str] | None = None,
    crop: Literal["center", "squash"] = "center",
    masks: Literal["file", "alpha"] | None = None,
    group: Literal["all", "id", "od"] = "all",
) -> tuple[Concept, ...]:
    """The concepts of a folder of pictures (one), of a folder of such folders, or of WebDataset tars; sorted by name.

    Within a concept's folder pictures may lie in any folder. size: pixels of a side; the largest centred square is cut
    out ("center") or the aspect given up ("squash"), then resized (bicubic, antialiased; masks nearest).
    names: only these, in this order. group: only these of NovelConcepts10, or of what a picture's JSON says.
    masks: "file" is `<stem>.mask.png` beside the picture or `masks/<stem>.png`; "alpha" the picture's own alpha, its
    colours kept as they are; None reads none. Captions come from `<stem>.json` or the file's name,
    "" if that has no letter.
    Raises DataError naming the file for a picture or mask that is missing, unreadable, empty or of another size.
    """
    if size < 1 or crop not in ("center", "squash") or masks not in (None, "file", "alpha"):
        raise ConfigError(
            f"size {size}, crop {crop!r}, masks {masks!r}: size >= 1, crop center or squash, masks file, alpha or null."
        )
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root} does not exist.\n{FORMS}")
    tars = (
        [root] if root.is_file() else sorted(p for p in root.iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")))
    )
    found = in_tars(tars) if tars else in_folders(root)
    chosen = _chosen(root, found, names, group)
    return tuple(_concept(name, found[name], size=size, crop=crop, masks=masks) for name in chosen)


def _chosen(
    root: Path, found: Mapping[str, list[Sample]], names: Sequence[str] | None, group: Literal["all", "id", "od"]
) -> list[str]:
    """The names of the concepts to read, in order."""
    if group not in ("all", "id", "od"):
        raise ConfigError(f"group {group!r}: all, id or od is wanted.")
    if missing := [n for n in names or () if n not in found]:
        raise DataError(
            f"{root} has no concept {missing[0]!r}.{suggest(missing[0], list(found))}  It has: {', '.join(sorted(found))}."
        )
    chosen = [n for n in names or found if group in ("all", _group(n, found[n]))]
    if not chosen:
        raise DataError(f"{root} has no concept of group {group!r}. Use group: all; it has {', '.join(sorted(found))}.")
    return list(dict.fromkeys(chosen))


def _group(name: str, samples: Sequence[Sample]) -> str | None:
    return next((s.about["group"] for s in samples if s.about.get("group")), _GROUPS.get(name.lower()))


def _concept(name: str, samples: Sequence[Sample], *, size: int, crop: str, masks: str | None) -> Concept:
    if masks == "file" and (bare := [s.name for s in samples if s.mask is None]):
        raise DataError(
            f"{bare[0]} has no mask, as {len(bare)} of the {len(samples)} pictures of {name}.\n"
            f"  Put it beside the picture as {samples[0].stem}.mask.png or into masks/{samples[0].stem}.png, or set masks: null."
        )
    images, small = [], []
    for sample in samples:
        picture, alpha = _open(sample)
        if min(picture.size) < size:
            small.append(min(picture.size))
        mask = None
        if masks == "file":
            mask = read_mask(_bytes(sample.mask), name=sample.mask_name, size=picture.size)
        elif masks == "alpha":
            if alpha is None:
                raise DataError(f"{sample.name} has no alpha channel to take as its mask. Set masks: file or null.")
            mask = alpha
        if mask is not None:
            mask = fit(mask, size, crop, nearest=True)
            refuse_empty(mask.numpy(), f"of {sample.name}, within the {crop} {size}x{size} crop,")
            mask = mask.float() / 255
        caption = sample.about.get("caption")
        if caption is None:
            words = sample.stem.replace("_", " ").strip()
            caption = words if any(c.isalpha() for c in words) else ""  # 00.jpg tells nothing
        images.append(ConceptImage.of(name, sample.stem, fit(picture, size, crop), mask, caption))
    if small:
        log.warning(
            "%s: %d pictures are smaller than %d (down to %d) and are enlarged.", name, len(small), size, min(small)
        )
    return Concept.of(name, images, _group(name, samples))


def _open(sample: Sample) -> tuple["Image.Image", "Image.Image | None"]:
    """The picture in RGB, turned as its EXIF data says, and its alpha channel if it has one."""
    from PIL import Image, ImageOps

    data = _bytes(sample.picture)
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise DataError(
            f"{sample.name} cannot be read as an image ({err}). Restore it, or take it out of the set."
        ) from err
    if too_deep(data, image):
        raise DataError(f"{sample.name} has more than 8 bits a channel. Convert it to 8 bits first.")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")  # colours stay as they are stored, under transparent pixels too


def _bytes(stored: Path | bytes) -> bytes:
    return stored.read_bytes() if isinstance(stored, Path) else stored

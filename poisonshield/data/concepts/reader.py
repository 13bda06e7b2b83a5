"""Concepts from folders and tars of pictures.

Pictures are cut and resized here, once, and each mask with the same crop.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.layout import FORMS, Sample, in_folders
from poisonshield.data.concepts.tar_samples import in_tars
from poisonshield.data.images import fit
from poisonshield.data.masks import read_mask, refuse_empty
from poisonshield.data.pictures import Picture, is_picture, read_picture
from poisonshield.data.summary import Summary
from poisonshield.errors import ConfigError, DataError
from poisonshield.registry import suggest

log = logging.getLogger(__name__)

Crop = Literal["center", "squash"]
Masks = Literal["file", "alpha"]

IN_DISTRIBUTION = ("BlackKeyboard", "CautionSign", "CokeCan", "EuroCoin", "MetalWrench")
OUT_OF_DISTRIBUTION = ("BlueElephant", "ButterflyClip", "CatPaw", "FishDoll", "MonkeySleigh")
"""NovelConcepts10 (Styborski et al. 2025): concepts that Stable Diffusion saw in training, and those it did not."""

TARS = tuple(f".{ending}" for ending in ("tar", "tar.gz", "tgz", "tar.bz2", "tbz2", "tar.xz", "txz"))
"""Endings of tars that are read from a folder."""

_GROUPS = {n.lower(): "id" for n in IN_DISTRIBUTION} | {n.lower(): "od" for n in OUT_OF_DISTRIBUTION}


def load_concepts(
    root: str | Path,
    *,
    size: int,
    names: Sequence[str] | None = None,
    crop: Crop = "center",
    masks: Masks | None = None,
    group: Literal["all", "id", "od"] = "all",
    summary: Summary | None = None,
) -> tuple[Concept, ...]:
    """The concepts of a folder of pictures (one), of a folder of such folders, or of WebDataset tars; sorted by name.

    Within a concept's folder pictures may lie in any folder. size: pixels of a side; the largest centred square is cut
    out ("center") or the aspect given up ("squash"), then resized (bicubic, antialiased; masks nearest).
    names: only these, in this order. group: only these of NovelConcepts10, or of what a picture's JSON says.
    masks: "file" is `<stem>.mask.png` beside the picture or `masks/<stem>.png`, and as other tools call them (see
    masks.sort_masks); "alpha" the picture's own alpha, its colours kept as they are; None reads none. Captions come
    from `<stem>.json`, `<stem>.txt` or the file's name, "" if that has no letter.
    summary: told what was read and what was left out, and why.
    Raises DataError naming the file for a picture or mask that is missing, unreadable, empty or of another size.
    """
    if size < 1 or crop not in ("center", "squash") or masks not in (None, "file", "alpha"):
        raise ConfigError(
            f"size {size}, crop {crop!r}, masks {masks!r}: size >= 1, crop center or squash, masks file, alpha or null."
        )
    root, summary = Path(root), summary or Summary(str(root))
    if not root.exists():
        raise DataError(f"{root} does not exist.\n{FORMS}")
    tars = [root] if root.is_file() else _find_tars(root, summary)
    found = in_tars(tars, summary) if tars else in_folders(root, summary)
    chosen = _choose(root, found, names, group)
    _tell(summary, found, chosen, masks)
    return tuple(_concept(name, found[name], size=size, crop=crop, masks=masks) for name in chosen)


def _find_tars(root: Path, summary: Summary) -> list[Path]:
    """The tars in a folder. Raises DataError for pictures beside them, and for what is no folder."""
    if not root.is_dir():
        raise DataError(f"{root} is neither a folder nor a plain file.\n{FORMS}")
    tars = sorted(path for path in root.iterdir() if path.name.endswith(TARS))
    for path in (path for path in sorted(root.iterdir()) if tars and path not in tars):
        if is_picture(path) and not path.name.startswith("."):
            raise DataError(f"{path} lies beside {tars[0]}: which of them are wanted? Move the others elsewhere.")
        summary.leave_out("files or folders beside the tars", path.name)
    return tars


def _tell(summary: Summary, found: Mapping[str, list[Sample]], chosen: Sequence[str], masks: Masks | None) -> None:
    """Count what is read, by concept, and name what nobody asked for."""
    samples = [sample for name in chosen for sample in found[name]]
    masked = [sample for sample in samples if sample.mask is not None]
    summary.take("concepts", len(chosen))
    summary.take("pictures", len(samples))
    if masks == "file":
        summary.take("masks", len(masked))
    for sample in masked if masks != "file" else ():
        summary.leave_out("mask files, which no setting asks for", sample.mask_name)
    if captions := sum(bool(sample.about.get("caption")) for sample in samples):
        summary.take("captions", captions)
    for name in found.keys() - set(chosen):
        summary.leave_out("concepts that no setting asks for", name)
    summary.choose("pictures by concept: " + ", ".join(f"{name} {len(found[name])}" for name in chosen) + ".")


def _choose(
    root: Path, found: Mapping[str, list[Sample]], names: Sequence[str] | None, group: Literal["all", "id", "od"]
) -> list[str]:
    """The names of the concepts to read, in order."""
    if group not in ("all", "id", "od"):
        raise ConfigError(f"group {group!r}: all, id or od is wanted.")
    if missing := [n for n in names or () if n not in found]:
        raise DataError(
            f"{root} has no concept {missing[0]!r}.{suggest(missing[0], list(found))}  It has: "
            f"{', '.join(sorted(found))}."
        )
    chosen = [n for n in names or found if group in ("all", _group(n, found[n]))]
    if not chosen:
        raise DataError(f"{root} has no concept of group {group!r}. Use group: all; it has {', '.join(sorted(found))}.")
    return list(dict.fromkeys(chosen))


def _group(name: str, samples: Sequence[Sample]) -> str | None:
    return next((s.about["group"] for s in samples if s.about.get("group")), _GROUPS.get(name.lower()))


def load_images(
    files: Sequence[Path],
    *,
    size: int,
    crop: Crop = "center",
    masks: Mapping[str, Path] | None = None,
    concept: str = "pictures",
) -> tuple[ConceptImage, ...]:
    """Single picture files as load_concepts reads those of a concept, in the order given.

    masks: the mask file of each by the picture's stem. concept: the name in their keys. Raises DataError as
    load_concepts does.
    """
    samples = []
    for path in files:
        mask = None if masks is None else masks.get(path.stem)
        samples.append(Sample(path.stem, str(path), path, mask, str(mask)))
    return _images(concept, samples, size=size, crop=crop, masks=None if masks is None else "file")


def _concept(name: str, samples: Sequence[Sample], *, size: int, crop: Crop, masks: Masks | None) -> Concept:
    return Concept.of(name, _images(name, samples, size=size, crop=crop, masks=masks), _group(name, samples))


def _images(
    name: str, samples: Sequence[Sample], *, size: int, crop: Crop, masks: Masks | None
) -> tuple[ConceptImage, ...]:
    """The pictures of a concept, cut and resized. Says how many had to be enlarged."""
    if masks == "file" and (bare := [s for s in samples if s.mask is None]):
        raise DataError(
            f"{bare[0].name} has no mask, as {len(bare)} of the {len(samples)} pictures of {name}.\n"
            f"  Put it beside the picture as {bare[0].stem}.mask.png or into masks/{bare[0].stem}.png. To have masks "
            "made, run\n    poisonshield masks PHOTOS -o MASKED\n  and train with data.train=MASKED/concepts."
        )
    images, small = [], []
    for sample in samples:
        picture = read_picture(sample.picture, name=sample.name)
        small += [side for side in [min(picture.image.size)] if side < size]
        mask = _mask(sample, picture, size=size, crop=crop, masks=masks)
        images.append(ConceptImage.of(name, sample.stem, fit(picture.rgb, size, crop), mask, _caption(sample)))
    if small:
        log.warning(
            "%s: %d pictures are smaller than %d (down to %d) and are enlarged.", name, len(small), size, min(small)
        )
    return tuple(images)


def _mask(sample: Sample, picture: Picture, *, size: int, crop: Crop, masks: Masks | None) -> Tensor | None:
    """float32 [1, size, size] in [0, 1], cut as its picture is; None if no masks are read."""
    if masks is None:
        return None
    if masks == "alpha" or sample.mask is None:
        found = picture.alpha
        if found is None:
            raise DataError(f"{sample.name} has no alpha channel to take as its mask. Set masks: file or null.")
    else:
        found = read_mask(sample.mask, name=sample.mask_name, size=picture.image.size)
    mask = fit(found, size, crop, nearest=True)
    refuse_empty(mask.numpy(), f"of {sample.name}, within the {crop} {size}x{size} crop,")
    return mask.float() / 255


def _caption(sample: Sample) -> str:
    """What its JSON says, else the words of its name; "" for a name without a letter, as 00.jpg tells nothing."""
    caption = sample.about.get("caption")
    if caption is not None:
        return caption
    words = sample.stem.replace("_", " ").strip()
    return words if any(c.isalpha() for c in words) else ""

"""Masks of photographs as files to look at, correct, and train with.

Out comes a folder that `data.train` takes with `data.masks=file` and `szt.mask=file`: copies of the photos, each with
its `<stem>.mask.png`, by concept. A sheet shows them all. What was made once is never written over unasked, as somebody
may have corrected it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.api.photos import Photo, read_photo, refuse_among_originals, refuse_file, write_drawn, write_png
from poisonshield.batch import Batch
from poisonshield.config.spelled import pick_spelled
from poisonshield.data.concepts.layout import CAPTIONS, Sample, in_folders
from poisonshield.data.summary import Summary
from poisonshield.defenses.base import Defense
from poisonshield.defenses.diffusion.masks.base import MaskProvider, looks_wrong
from poisonshield.defenses.diffusion.szt import MASKS
from poisonshield.defenses.purify.named import build_purifier, purifier_block
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import write_whole, writing
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.reports.sheets import draw_sheet

log = logging.getLogger(__name__)

CONCEPTS, SHEET = "concepts", "masks.png"
"""What lies in the folder that is written."""

_COLUMNS = 6
_THUMB = 320  # pixels of the longer side in the sheet


@dataclass(frozen=True)
class Masks:
    """The masks of a folder of photos, which go by "concept/stem"."""

    sheet: Path
    """A picture with all of them."""
    areas: dict[str, float] = field(default_factory=dict)
    """Of each photo that has a mask, the mask's share of the picture."""
    empty: list[str] = field(default_factory=list)
    """Photos without one."""
    summary: Summary | None = None
    """What was read and what was left out."""


def masks(
    photos: str | Path,
    out: str | Path,
    *,
    mask: str,
    side: float | None = None,
    model: str | Path | None = None,
    words: Sequence[str] = (),
    purifier: str | None = "jpeg:25",
    size: int = 512,
    seed: int = 0,
    overwrite: bool = False,
) -> Masks:
    """Masks of a folder of photos (one concept), or of a folder of such folders.

    mask: the name of a provider in defenses/diffusion/masks, with settings as in box:0.5 or box:side=0.5. side: that of
    the centred rectangle of box and grabcut. model, and words (WORD for all, or CONCEPT=WORD): for masks that look for
    a word. As in training they are found on purified pixels (a text, or None
    for the photo as it is) with `size` on the longer side, and then brought to the photo's own size. Empty masks are
    not written; their photos are. Raises ConfigError, and DataError for files that are there without `overwrite`.
    """
    out, summary = Path(out), Summary(str(photos))
    refuse_among_originals(out, [Path(photos)])
    refuse_file(out)
    concepts = _find_concepts(Path(photos), summary)
    picked = pick_spelled(mask, MASKS, **({} if side is None else {"side": side}))
    provider = picked.cls(picked.config, seed=seed)
    network, word_of = _load_network(provider, model, words, list(concepts))
    clean = build_purifier(None if purifier is None else purifier_block(purifier), seed=seed)
    places = {path: out / CONCEPTS / name / path.name for name, files in concepts.items() for path in files}
    if not overwrite and (there := next((p for p in map(_mask_beside, places.values()) if p.exists()), None)):
        raise DataError(f"{there} exists, and may have been corrected. Choose another folder, or give --overwrite.")
    for path, place in places.items():
        read_photo(path, place)  # an unreadable one is told before anything is written
    found = Masks(out / SHEET, summary=summary)
    rows: dict[str, list[Tensor]] = {}
    with writing(out, what="set of masks", names=_name_files(out, places)):
        for name, files in concepts.items():
            for i, path in enumerate(files):
                photo = read_photo(path, places[path])
                made = _find_mask(provider, photo, f"{name}/{photo.key}", size, clean, network, word_of.get(name))
                area = float(made.float().mean())
                _write(photo, made if area else None)
                if area:
                    found.areas[f"{name}/{photo.key}"] = area
                else:
                    found.empty.append(f"{name}/{photo.key}")
                row = name if i < _COLUMNS else f"{name} {1 + i // _COLUMNS}"
                rows.setdefault(row, []).append(dim_outside(photo.pixels, made))
        title = f"{mask}: the outside is dimmed"
        write_drawn(found.sheet, lambda at: draw_sheet(at, rows, columns=_COLUMNS, inches=1.8, title=title))
    return found


def describe(found: Masks) -> Iterator[str]:
    """Lines about what was read and found, and what asks for a look."""
    if found.summary is not None:
        yield from found.summary.lines()
    areas = sorted(found.areas.values())
    if areas:
        middle = areas[len(areas) // 2]
        least, median, most = (f"{100 * area:.0f}" for area in (areas[0], middle, areas[-1]))
        yield f"{len(areas)} masks, of {least} to {most} % of the picture (median {median} %)"
    for key, area in found.areas.items():
        if looks_wrong(area):
            yield f"{key}: the mask covers {100 * area:.1f} % of the picture. Is it the concept's?"
    for key in found.empty:
        yield f"{key}: the mask is EMPTY and was not written. Draw one, take the photo out, or try another --mask."
    yield f"Look at {found.sheet}; correct what is wrong in {found.sheet.parent / CONCEPTS}, and train with"
    yield f"  data.train={found.sheet.parent / CONCEPTS} data.masks=file defenses.0.mask=file"


def dim_outside(pixels: Tensor, mask: Tensor) -> Tensor:
    """A small picture [3, h, w] in [0, 1] of uint8 [3, H, W], dimmed outside of a bool mask [H, W], with its edge."""
    height, width = (max(1, round(s * min(1.0, _THUMB / max(mask.shape)))) for s in mask.shape)
    x = F.interpolate(pixels[None].float() / 255, (height, width), mode="area")[0]
    inside = F.interpolate(mask[None, None].float(), (height, width), mode="area") >= 0.5  # [1, 1, h, w]
    ring = (F.max_pool2d(inside.float(), 5, 1, 2) > 0) & ~inside
    x = torch.where(inside[0], x, 0.3 * x)
    return torch.where(ring[0], x.new_tensor([1.0, 0.0, 1.0]).view(3, 1, 1), x)


def _find_concepts(root: Path, summary: Summary) -> dict[str, list[Path]]:
    """The photos of each concept, as training finds them. summary: told what is not taken."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give a folder of photos, or a folder with one of each concept.")
    found = in_folders(root, summary)
    summary.take("concepts", len(found))
    summary.take("photos", sum(map(len, found.values())))
    for sample in (sample for samples in found.values() for sample in samples if sample.mask is not None):
        summary.leave_out("mask files, in whose place others are made", sample.mask_name)
    return {name: list(map(_file_of, samples)) for name, samples in found.items()}


def _file_of(sample: Sample) -> Path:
    assert isinstance(sample.picture, Path)  # in folders every picture is a file
    return sample.picture


def _load_network(
    provider: MaskProvider, model: str | Path | None, words: Sequence[str], concepts: Sequence[str]
) -> tuple[LatentDiffusion | None, Mapping[str, str]]:
    """The model with a placeholder, and each concept's word, where the mask needs them."""
    if not provider.needs_word:
        if model is not None or words:
            raise ConfigError(f"mask {provider.name} looks at pixels alone: leave --model and --word out.")
        return None, {}
    if model is None:
        raise ConfigError(f"mask {provider.name} asks a model: give --model, a Stable Diffusion folder or tiny.")
    if len(common := [text for text in words if "=" not in text]) > 1:
        raise ConfigError(f"--word {common[0]} and --word {common[1]}: one is for all concepts. Write CONCEPT=WORD.")
    word_of: dict[str, str] = {}
    for text in words:
        name, equals, word = text.rpartition("=")
        if equals and name not in concepts:
            raise ConfigError(f"--word {text}: there is no concept {name!r}. There are: {', '.join(concepts)}.")
        word_of |= {name: word} if equals else {c: text for c in concepts if c not in word_of}
    if missing := [c for c in concepts if not word_of.get(c)]:
        raise ConfigError(
            f"mask {provider.name} looks for a word, and {missing[0]} has none. Give --word WORD, or "
            f"--word {missing[0]}=WORD."
        )
    network = LatentDiffusion.load(model).to(choose_device("auto"))
    if not network.placeholders:
        network.add_placeholder("<concept>")
    return network, word_of


@torch.no_grad()
def _find_mask(
    provider: MaskProvider,
    photo: Photo,
    key: str,
    size: int,
    purifier: Defense | None,
    network: LatentDiffusion | None,
    word: str | None,
) -> Tensor:
    """The photo's mask, bool [H, W]."""
    full = photo.pixels.shape[1:]
    small = [max(1, round(s * size / max(full))) for s in full]
    x = F.interpolate(photo.pixels[None].float(), small, mode="bicubic", antialias=True, align_corners=False)
    batch = Batch((key,), x.round().clamp(0, 255) / 255)
    if purifier is not None:
        batch = purifier.before(batch)
    made = provider(batch, network, None if word is None else [word]).float().cpu()
    return F.interpolate(made, tuple(full), mode="bilinear", align_corners=False)[0, 0] >= 0.5


def _name_files(out: Path, places: Mapping[Path, Path]) -> list[str]:
    """What is written, by paths from `out`: the sheet, masks, and copies where nothing equal is there."""
    copies = [copy for photo, place in places.items() for copy in _list_copies(photo, place)]
    changed = [to for source, to in copies if not (to.is_file() and to.read_bytes() == source.read_bytes())]
    files = [out / SHEET, *map(_mask_beside, places.values()), *changed]
    return [file.relative_to(out).as_posix() for file in files]


def _list_copies(photo: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """(file, copy) of a photo and the texts beside it."""
    for ending in (photo.suffix, ".json", *CAPTIONS):
        source, copy = photo.with_suffix(ending), place.with_suffix(ending)
        if source.is_file() and source.resolve() != copy.resolve():
            yield source, copy


def _mask_beside(photo: Path) -> Path:
    """Where the mask of a photo lies."""
    return photo.with_name(f"{photo.stem}.mask.png")


def _write(photo: Photo, mask: Tensor | None) -> None:
    """Copy the photo's file and its texts, and write the mask, or take one of an earlier time away."""
    from PIL import Image

    photo.out.parent.mkdir(parents=True, exist_ok=True)
    for source, copy in _list_copies(photo.path, photo.out):
        write_whole(copy, source.read_bytes())
    if mask is None:
        _mask_beside(photo.out).unlink(missing_ok=True)
    else:
        write_png(_mask_beside(photo.out), Image.fromarray(mask.numpy().astype(np.uint8) * 255))

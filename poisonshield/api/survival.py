"""What purifiers leave of poisons, and what they cost, from folders of picture files."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poisonshield.api.photos import Photo, find_photos, read_photo, refuse_file
from poisonshield.batch import Batch
from poisonshield.data.pictures import is_picture
from poisonshield.data.summary import Summary
from poisonshield.defenses.purify.named import build_purifier, parse_purifier, purifier_block
from poisonshield.errors import ConfigError, DataError
from poisonshield.evals.diffusion.parts.survival import Picture, Poisoned, Purified, Report, edges_of, measure
from poisonshield.files import MadeList, write_whole, writing

log = logging.getLogger(__name__)

STANDARD = (
    "jpeg:90", "jpeg:75", "jpeg:50", "jpeg:25", "gaussian:1", "gaussian:2", "median:3", "bits:4", "adverse_cleaner",
)  # fmt: skip
WITH_MODEL = ("vae_roundtrip", "sdedit:0.1", "sdedit:0.3")
"""Purifiers if none is named; the latter where a model is given."""


def survival(
    clean: str | Path,
    poisoned: Sequence[str | Path],
    *,
    purifiers: Sequence[str] = (),
    model: str | None = None,
    bands: int = 4,
    seed: int = 0,
    out: Path | None = None,
) -> Report:
    """Every purifier on the pictures of each folder of `poisoned` and on those of the same stems in `clean`.

    purifiers: texts such as jpeg:75, see defenses/purify/named.py; STANDARD if none.
    model: a Stable Diffusion folder, or tiny, for those that send pictures through one.
    bands: of frequency, of equal width up to 0.5 cycles a pixel.
    seed: of purifiers' noise, which depends on the stem and so is the same for a clean picture and a poisoned one.
    out: a JSON file. Raises ConfigError, and DataError for pictures without a clean one of their size.
    """
    if out is not None and (is_picture(out) or out.is_dir()):
        raise ConfigError(
            f"{out} is a {'folder' if out.is_dir() else 'picture'} by its name. Give a name for a JSON file."
        )
    if out is not None:
        refuse_file(out.parent)
        MadeList(out.parent).refuse_others([out.name])
    blocks = choose_purifiers(purifiers, model)
    originals = _read_folder(Path(clean))
    folders = {str(folder): _match(_read_folder(Path(folder)), originals, Path(clean)) for folder in poisoned}
    if len(folders) < len(poisoned) or not folders:
        raise ConfigError("name one folder of poisoned pictures or more, each of them once.")
    wanted = {key: originals[key] for photos in folders.values() for key in photos}
    found: dict[str, list[Purified]] = {folder: [] for folder in folders}
    for text, block in blocks.items():
        start = time.perf_counter()
        purifier = build_purifier(block, seed=seed)
        purified_clean = {key: _purify(purifier, photo) for key, photo in wanted.items()}
        for folder, photos in folders.items():
            rows = [
                _measure(photo, originals[key], _purify(purifier, photo), purified_clean[key], bands)
                for key, photo in photos.items()
            ]
            found[folder].append(Purified.of(text, block, rows))
        log.info("%s  %.1f s", text, time.perf_counter() - start)
    report = Report(
        clean=str(clean),
        model=model,
        seed=seed,
        edges=edges_of(bands),
        poisons=tuple(Poisoned(folder=folder, purifiers=tuple(rows)) for folder, rows in found.items()),
    )
    if out is not None:
        with writing(out.parent, what="set of numbers", names=[out.name]):
            write_whole(out, report.model_dump_json(indent=1) + "\n")
    return report


def choose_purifiers(purifiers: Sequence[str], model: str | None) -> dict[str, dict[str, Any]]:
    """Settings by text, checked.

    Raises ConfigError for a text that names no purifier, and for a model that is missing or that none of them uses.
    """
    texts = list(purifiers) or [*STANDARD, *(WITH_MODEL if model is not None else ())]
    blocks: dict[str, dict[str, Any]] = {}
    used = False
    for text in texts:
        given = parse_purifier(text)
        block = purifier_block(given) or {}
        if "pipeline" in block and "pipeline" not in given:
            if model is None:
                raise ConfigError(
                    f"{text} sends pictures through a model: give --model, a Stable Diffusion folder or tiny."
                )
            block, used = purifier_block({**given, "pipeline": model}) or {}, True
        blocks[text] = block
    if model is not None and not used:
        raise ConfigError(f"model {model} is given, and none of {', '.join(texts)} uses it. Leave it out.")
    return blocks


def describe(report: Report) -> str:
    """Tables in Markdown: for each poison PSNR and shares by purifier; of several also their shares side by side."""
    parts = []
    for poison in report.poisons:
        first = poison.purifiers[0]
        levels = max(p.max_levels for p in first.pictures)
        parts.append(
            f"{poison.folder}: {len(first.pictures)} pictures, changed by at most {levels} levels, "
            f"PSNR {_write_number(first.psnr_poisoned, 1)} dB"
        )
        parts.append(_describe_poison(poison, report.edges))
    if len(report.poisons) > 1:
        parts.append(_compare_poisons(report.poisons))
    return "\n\n".join(parts)


def _describe_poison(poison: Poisoned, edges: Sequence[float]) -> str:
    """A line for each purifier: what it costs, and what it leaves of the poison, in all and by frequency."""
    ends = (*edges[1:], None)
    ranges = [f"{a:.3g}-{'' if b is None else f'{b:.3g}'}" for a, b in zip(edges, ends, strict=True)]
    rows = [["purifier", "cost, dB", "purified, dB", "survives", *ranges]]
    for row in poison.purifiers:
        shares = [_write_number(v, 2) for v in (row.survival, *row.survival_by_band)]
        rows.append([row.purifier, _write_number(row.psnr_cost, 1), _write_number(row.psnr_purified, 1), *shares])
    return _align(rows)


def _compare_poisons(poisons: Sequence[Poisoned]) -> str:
    """A line for each purifier, a column for each poison: what is left of it."""
    rows = [["survives", *(Path(p.folder).name for p in poisons), "cost, dB"]]
    for same in zip(*(p.purifiers for p in poisons), strict=True):
        shares = [_write_number(p.survival, 2) for p in same]
        rows.append([same[0].purifier, *shares, _write_number(_mean_cost(same), 1)])
    return _align(rows)


def _mean_cost(rows: Sequence[Purified]) -> float | None:
    """Over all pictures that any poison has, each once."""
    known = {p.key: p.psnr_cost for row in rows for p in row.pictures if p.psnr_cost is not None}
    return sum(known.values()) / len(known) if known else None


def _read_folder(folder: Path) -> dict[str, Photo]:
    """The photos of a folder by stem."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give folders of pictures; poisoned ones have the stems of clean ones.")
    photos: dict[str, Photo] = {}
    summary = Summary(str(folder))
    found = find_photos([folder], summary)
    for line in summary.lines():
        log.info(line)
    for path in found:
        if path.stem in photos:
            raise DataError(f"{photos[path.stem].path} and {path} have one stem, and pictures are matched by it.")
        photos[path.stem] = read_photo(path, path)
    return photos


def _match(photos: Mapping[str, Photo], originals: Mapping[str, Photo], clean: Path) -> Mapping[str, Photo]:
    """The photos. Raises DataError for one that has no clean picture of its size."""
    for key, photo in photos.items():
        if key not in originals:
            raise DataError(f"{photo.path} has no picture {key} in {clean}. Folders must hold the same stems.")
        (height, width), (h, w) = (p.pixels.shape[1:] for p in (photo, originals[key]))
        if (height, width) != (h, w):
            raise DataError(
                f"{photo.path} is {width}x{height} pixels and {originals[key].path} {w}x{h}; equal is wanted."
            )
    return photos


@torch.no_grad()
def _purify(purifier: Any, photo: Photo) -> Tensor:
    """The photo's pixels purified, uint8 [3, H, W]."""
    x = purifier.before(Batch((photo.key,), photo.pixels[None].float() / 255)).x[0]
    return (x * 255).round().to(torch.uint8).cpu()


def _measure(photo: Photo, original: Photo, purified: Tensor, purified_clean: Tensor, bands: int) -> Picture:
    """One picture's numbers."""
    return measure(
        photo.key,
        clean=original.pixels,
        poisoned=photo.pixels,
        purified=purified,
        purified_clean=purified_clean,
        edges=edges_of(bands),
        sha256={"clean": original.sha256, "poisoned": photo.sha256},
    )


def _write_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other in plain text too."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(row, wide, strict=True)] for row in rows]
    lines.insert(1, ["-" * max(w, 3) for w in wide])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

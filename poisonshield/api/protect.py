"""Poison photographs before they are published, so that a model learns them badly.

A photo becomes a PNG of its own size under its own stem, with a manifest beside it that says how it was made and what
was measured on the file. The budget is checked on the file as it was read back. Both are moved into place whole; a
command that was stopped goes on where it was, and pictures that are done are left alone.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor

from poisonshield.api.photos import Photo, find_photos, read_masks, read_photo, refuse_among_originals, refuse_file
from poisonshield.config.reading import read_value
from poisonshield.data.masks import sort_masks
from poisonshield.data.summary import Summary
from poisonshield.engine.processes import choose_device
from poisonshield.errors import ConfigError, DataError
from poisonshield.files import Lock, draft_of, flush, read_bounded, tell_of_disk, write_whole
from poisonshield.models.diffusion.pipeline import DTYPES, LatentDiffusion
from poisonshield.poisons.diffusion.attack.manifest import manifest
from poisonshield.poisons.diffusion.attack.presets import resolve
from poisonshield.poisons.diffusion.base import DiffusionPoison
from poisonshield.runs.parts.concept_sets import refuse_long_prompts

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

STATE = ".poisonshield-state"
ENDING = ".poison.json"
_MAX_MANIFEST = 2**24  # bytes

TINY_NOTE = (
    "note: `tiny` is a pipeline of rendered shapes. What is made with it protects against nothing real:\n"
    "  give --model the folder of the model that pictures are to be protected from."
)


def protect(
    images: Sequence[Path],
    out: Path,
    *,
    method: str | None = None,
    preset: str | None = None,
    eps_levels: float | None = None,
    steps: int | None = None,
    prompt: str | None = None,
    settings: Sequence[str] = (),
    model: str | Path = "tiny",
    dtype: str = "fp32",
    device: str = "auto",
    seed: int = 0,
    mask: Path | None = None,
    target: Path | None = None,
    reference: Sequence[Path] = (),
    class_images: Sequence[Path] = (),
    tile: int = 512,
    micro_batch: int = 1,
    measure: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = log.info,
) -> list[Path]:
    """The PNG files written, one for each of `images` (files, or folders of them), in their order.

    Of several, a file that cannot be read is passed over, and at the end, when the others are done, a DataError names
    it. Methods whose pictures depend on each other (coupled) refuse it before they begin.

    out: a folder, or for one picture a name that ends in .png.
    method, preset: as in poisons/diffusion/attack/presets.py; "advdm" if neither is given.
    eps_levels, steps, prompt, settings ("key=value"): in place of the preset's.
    mask: a file, or a folder with a mask of each stem.
    target: a picture to pull towards. reference, class_images: for methods that train a surrogate.
    tile: larger sides are attacked in tiles, 0 never.
    measure: also write the objective before and after into the manifest.
    overwrite: replace pictures that were made otherwise.
    say: gets a line for each photo, and lines on what was read and left out.

    Raises ConfigError, DataError for files that are not whole 8-bit RGB or grey pictures, BudgetError, CheckpointError,
    StorageError, and BusyError while another process writes into the folder.
    """
    given: dict[str, Any] = {"eps_levels": eps_levels, "steps": steps, "prompt": prompt}
    given = {name: value for name, value in given.items() if value is not None} | _parse_settings(settings)
    if tile:
        given.setdefault("tile", tile)
    cls: type[DiffusionPoison]
    cls, config = resolve(method or (None if preset else "advdm"), preset, given)
    paths, failed = _find_readable(list(map(Path, images)), say)
    outs = _choose_places(paths, out)
    if out.suffix.lower() != ".png" or out.is_dir():
        refuse_among_originals(out, [*map(Path, images), *paths])
    network = LatentDiffusion.load(model, dtype=_pick_dtype(dtype)).to(choose_device(device))
    extra: dict[str, Any] = {}
    if target is not None:
        extra["target"] = read_photo(target, target).pixels
    for name, files in (("reference", reference), ("class_images", class_images)):
        if files:
            extra[name] = {p.stem: read_photo(p, p).pixels for p in _refuse_equal_stems(find_photos(files), name)}
    if (reference or class_images) and not cls.trains_surrogate:
        raise ConfigError(
            f"{cls.name} trains no surrogate: leave reference and class images out, or take fsmg or aspl."
        )
    poison = cls(config, model=network, seed=seed, **extra)
    refuse_long_prompts(poison)
    if failed and poison.coupled:
        raise _failure(failed, len(paths))
    size = len(paths) if poison.coupled else micro_batch
    places = list(zip(paths, outs, strict=True))
    for place in (place for place in outs if overwrite or not place.exists()):
        _refuse_other_picture(place)
    if not poison.coupled:  # hours may lie between the first photo and the last: look at all of them before
        for path, place in places:
            _check_ahead(poison, read_photo(path, place), mask, overwrite=overwrite)
    how: dict[str, Any] = {"micro_batch": micro_batch, "measure": measure, "overwrite": overwrite, "say": say}
    with Lock(outs[0].parent, what="set of protected photos"), tell_of_disk(out):
        for start in range(0, len(paths), size):
            photos = [read_photo(path, place) for path, place in places[start : start + size]]
            _protect(poison, photos, read_masks(photos, mask), preset, **how)
    if failed:
        raise _failure(failed, len(paths))
    return outs


def _find_readable(given: Sequence[Path], say: Callable[[str], None]) -> tuple[list[Path], dict[Path, DataError]]:
    """The photos that can be read, and of the others why not.

    Raises ConfigError for a photo that is given twice, DataError for one that is missing, and if none can be read.
    """
    summary = Summary(", ".join(map(str, given)))
    failed: dict[Path, DataError] = {}
    _, masks = sort_masks(Path(path.name) for path in given if path.is_file())
    found: list[Path] = []
    for path in given:
        try:
            if (name := Path(path.name)) in masks and path.is_file():
                raise DataError(f"{path} is the mask of {masks[name]} by its name. Give it with --mask.")
            found += find_photos([path], summary)
        except DataError as err:
            if not path.is_file():
                raise
            failed[path] = err
    _refuse_twice(found)
    for path in found:
        try:
            read_photo(path, path)
        except DataError as err:
            failed[path] = err
    readable = [path for path in found if path not in failed]
    if not readable:
        raise _failure(failed, 0) if failed else DataError("no pictures were given. Give files or folders of them.")
    for line in (*summary.lines(), *(f"not done: {err}" for err in failed.values())):
        say(line)
    return readable, failed


def _refuse_twice(paths: Sequence[Path]) -> None:
    """Raise ConfigError for a file that is there twice, also through a link."""
    seen: dict[Path, Path] = {}
    for path in paths:
        if (place := path.resolve()) in seen:
            other = seen[place]
            told = f"{path} was given twice" if other == path else f"{other} and {path} are one file"
            raise ConfigError(f"{told}. Give each photo once.")
        seen[place] = path


def _failure(failed: Mapping[Path, DataError], done: int) -> DataError:
    """What is said of files that were not done, and why."""
    if len(failed) == 1 and not done:
        return next(iter(failed.values()))
    reasons = "".join(f"\n  {err}" for err in failed.values())
    return DataError(f"{len(failed)} of {len(failed) + done} files were not protected:{reasons}")


def _protect(
    poison: DiffusionPoison,
    photos: Sequence[Photo],
    masks: Mapping[str, Tensor] | None,
    preset: str | None,
    *,
    micro_batch: int,
    measure: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Attack some photos and write what comes out, each as soon as it is there."""
    together = poison.identity({p.key: p.pixels for p in photos}, masks) if poison.coupled else None
    names = {p.key: together or poison.identity({p.key: p.pixels}, masks) for p in photos}
    done = [p for p in photos if not overwrite and _is_done(p, names[p.key])]
    if len(done) == len(photos) or not poison.coupled:
        for photo in done:
            say(f"{photo.out}  is there already, made in this very way")
        photos = [p for p in photos if p not in done]
    by_key = {p.key: p for p in photos}
    if not photos:
        return
    for folder in {p.out.parent for p in photos}:
        folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pixels = {p.key: p.pixels for p in photos}
    with _show_progress(", ".join(by_key)) as progress:
        run = poison.run(
            pixels, masks=masks, micro_batch=micro_batch, state_folder=photos[0].out.parent / STATE, progress=progress
        )
        for key, result in run:
            photo = by_key[key]
            record = manifest(poison, key, photo.pixels, result, preset=preset)
            if measure:
                record["objective"] = _measure_objective(poison, key, photo.pixels, result, masks)
            _write(photo, result, {**record, "identity": names[key]}, poison)
            m, took = record["measured"], time.perf_counter() - start
            say(f"{photo.out}  max {m['max']}  mean {m['mean_abs']:.2f}  PSNR {_format_db(m['psnr_db'])}  {took:.1f} s")


def _check_ahead(poison: DiffusionPoison, photo: Photo, mask: Path | None, *, overwrite: bool) -> None:
    """Raise what `_protect` would when the photo's turn comes: no mask for it, or an output that was made otherwise."""
    masks = read_masks([photo], mask)
    if photo.out.exists() and not overwrite:
        _is_done(photo, poison.identity({photo.key: photo.pixels}, masks))


def _measure_objective(
    poison: DiffusionPoison, key: str, source: Tensor, result: Tensor, masks: Mapping[str, Tensor] | None
) -> dict[str, float]:
    """The poison's objective on a picture before and after."""
    clean = {key: source}
    before, after = (poison.measure({key: x}, clean=clean, masks=masks, micro_batch=1)[key] for x in (source, result))
    return {"before": before, "after": after, "draws": 32}


def _write(photo: Photo, result: Tensor, record: dict[str, Any], poison: DiffusionPoison) -> None:
    """The PNG and its manifest in place, after the file was read back: same pixels, budget kept."""
    draft = draft_of(photo.out)
    try:
        _to_image(result, photo.alpha).save(draft, format="PNG", icc_profile=photo.profile)
        stored = read_photo(draft, photo.out, format="PNG")
        record = {**record, **manifest(poison, photo.key, photo.pixels, stored.pixels, preset=record["preset"])}
        kept = photo.alpha is None if stored.alpha is None else photo.alpha is not None
        if not torch.equal(stored.pixels, result) or not kept or (kept and not _are_equal(stored.alpha, photo.alpha)):
            raise DataError(f"{draft} does not hold what was written to it. Look at the disk and repeat the command.")
        record["source"] = {"file": photo.path.name, "sha256": photo.sha256}
        record["png_sha256"] = stored.sha256
        flush(draft)
        # The manifest first: one without its picture is merely redone; a picture without one could be anybody's.
        write_whole(manifest_of(photo.out), json.dumps(record, indent=1) + "\n")
        os.replace(draft, photo.out)
        flush(photo.out.parent)
    finally:
        draft.unlink(missing_ok=True)


def manifest_of(png: Path) -> Path:
    """Where the manifest of a protected picture lies."""
    return png.with_name(f"{png.stem}{ENDING}")


def _refuse_other_picture(place: Path) -> None:
    """Raise ConfigError if something is where the picture or its manifest goes and is not what protect wrote."""
    beside = manifest_of(place)
    try:
        if not beside.exists() and not place.exists():
            return
        known = _read_manifest(place)["png_sha256"]
        if not place.exists() or hashlib.sha256(place.read_bytes()).hexdigest() == known:
            return
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # DataError is a ValueError
        pass
    raise ConfigError(
        f"{place if place.exists() else beside} is there and is not what protect wrote, so it is not replaced.\n"
        "  Choose another folder, or move it away."
    )


def _read_manifest(png: Path) -> dict[str, Any]:
    return json.loads(read_bounded(manifest_of(png), max_bytes=_MAX_MANIFEST, what="manifest"))


def _is_done(photo: Photo, name: str) -> bool:
    """Whether the output is there, whole, and made in the very same way. Raises ConfigError if it is something else."""
    if not photo.out.exists():
        return False
    try:
        record = _read_manifest(photo.out)
        if record["identity"] == name and record["png_sha256"] == hashlib.sha256(photo.out.read_bytes()).hexdigest():
            return True
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # DataError is a ValueError
        pass
    raise ConfigError(f"{photo.out} exists and was made otherwise. Choose another folder, or give --overwrite.")


def _refuse_equal_stems(paths: Sequence[Path], what: str) -> Sequence[Path]:
    """The paths. Raises ConfigError for two of one stem, by which pictures are known."""
    by_stem: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_stem:
            raise ConfigError(
                f"{what}: {by_stem[path.stem]} and {path} are both called {path.stem}. Rename one of them."
            )
        by_stem[path.stem] = path
    return paths


def _choose_places(paths: Sequence[Path], out: Path) -> list[Path]:
    """Where each picture goes. Raises ConfigError for other formats than PNG and for places that clash."""
    suffix = out.suffix.lower()
    if suffix in (".jpg", ".jpeg"):
        raise ConfigError(
            f"{out}: a JPEG would undo the protection, since lossy compression is a defense against it.\n"
            "  Give a folder or a name that ends in .png, and do not convert the result."
        )
    if suffix in (".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"):
        raise ConfigError(f"{out}: PNG is what is written. Give a folder or a name that ends in .png.")
    if suffix == ".png" and not out.is_dir():
        if len(paths) > 1:
            raise ConfigError(f"{out} is one file, and {len(paths)} pictures were given. Give a folder.")
        outs = [out]
    else:
        outs = [out / f"{p.stem}.png" for p in paths]
    refuse_file(outs[0].parent)
    by_place: dict[Path, Path] = {}
    for path, place in zip(paths, outs, strict=True):
        if place in by_place:
            raise ConfigError(
                f"{by_place[place]} and {path} would both become {place}. Rename one, or protect them into two folders."
            )
        by_place[place] = path
        if place.resolve() == path.resolve():
            raise ConfigError(f"{place} is the picture itself. Give another folder: the original is needed to measure.")
    return outs


def _parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    out = {}
    for text in overrides:
        name, equals, raw = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r} is not a setting. Write name=value, for example t_range=[500,1000].")
        out[name] = read_value(raw, label=f"--set {name}")
    return out


def _pick_dtype(name: str) -> torch.dtype:
    if name not in ("fp32", "bf16"):
        raise ConfigError(f"dtype {name!r}: fp32 or bf16 is wanted; fp16 overflows in some VAEs.")
    return DTYPES[name]


def _to_image(pixels: Tensor, alpha: "Image.Image | None") -> "Image.Image":
    from PIL import Image

    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _are_equal(a: "Image.Image | None", b: "Image.Image | None") -> bool:
    return a is b if a is None or b is None else a.tobytes() == b.tobytes()


def _format_db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"


@contextmanager
def _show_progress(what: str) -> Iterator[Any]:
    """A bar in a terminal, and nothing elsewhere."""
    from poisonshield.terminal import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what[:40], total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""What lies where in folders of concepts: which file is a photo, which its mask, its JSON or its caption.

No picture is decoded here. Where names leave open what belongs together, that is an error; what is not taken is told.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poisonshield.data.masks import is_mask_folder, sort_masks
from poisonshield.data.pictures import is_hidden, is_picture, walk_files
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError
from poisonshield.files import read_bounded

FORMS = (
    "  Wanted: a folder of pictures; a folder of such folders, one a concept; or WebDataset tars\n"
    "  (key.png, key.mask.png, key.json, key.txt)."
)

CAPTIONS = (".txt", ".caption")
"""Endings of texts beside a photo that say what it shows."""

HIDDEN, OTHER, NO_PHOTO = "hidden files or folders", "files that are no pictures by their ending", "without a photo"
"""Reasons for what is left out."""

_MAX_TEXT = 2**20  # bytes of a JSON or a caption


@dataclass(frozen=True)
class Sample:
    """One picture before it is read. name, mask_name: how errors call it and its mask. about: its JSON and caption."""

    stem: str
    name: str
    picture: Path | bytes
    mask: Path | bytes | None = None
    mask_name: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def in_folders(root: Path, summary: Summary) -> dict[str, list[Sample]]:
    """The pictures of each concept, in order of their paths. summary: told what is not taken."""
    seen = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    alone, folders = [p for p in seen if is_picture(p) and p.is_file()], [p for p in seen if p.is_dir()]
    if alone and (others := [p for p in folders if not is_mask_folder(p.name) and _pictures(p)]):
        raise DataError(
            f"{alone[0]} lies beside {others[0]}, which holds pictures too: is this one concept or several?\n"
            "  Put the pictures of each concept into a folder of its own."
        )
    if alone or any(p.name.lower() in ("mask", "masks") for p in folders):
        return _refuse_none(root, {root.resolve().name: _in_folder(root.resolve(), summary)})
    found = {folder.name: _in_folder(folder, summary) for folder in folders}
    for name in (name for name, samples in found.items() if not samples):
        summary.leave_out("folders without a picture", name)
    for path in (p for p in sorted(root.iterdir()) if p not in folders):
        summary.leave_out(HIDDEN if path.name.startswith(".") else OTHER, path.name)
    return _refuse_none(root, {name: samples for name, samples in found.items() if samples})


def _refuse_none(root: Path, found: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    if not any(found.values()):
        raise DataError(f"{root} holds no picture.\n{FORMS}")
    return found


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _walk(folder, Summary("")) if is_picture(path)]


def _walk(folder: Path, summary: Summary) -> list[Path]:
    """All files of a folder at every depth, sorted. summary: told of what is hidden, and of links to folders."""
    passed: list[Path] = []
    found = walk_files(folder, passed_over=passed)
    for path in passed:
        other = "links to folders" if path.is_dir() else "links to nowhere, pipes or devices"
        why = HIDDEN if is_hidden(path.name) else other
        summary.leave_out(why, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return found


def _in_folder(folder: Path, summary: Summary) -> list[Sample]:
    files = _walk(folder, summary)
    there = set(files)
    photos, masks = sort_masks(path.relative_to(folder) for path in files if is_picture(path))
    by_stem = _by_stem(folder, ((path.stem, path) for path in photos))
    mask_of = _by_stem(folder, ((stem, path) for path, stem in masks.items()))
    samples, texts = [], set()
    for stem, path in by_stem.items():
        beside = {end: path.with_name(f"{stem}{end}") for end in (".json", *CAPTIONS)}
        beside = {end: text for end, text in beside.items() if text in there}
        texts |= set(beside.values())
        read = {end: read_bounded(text, max_bytes=_MAX_TEXT, what="text") for end, text in beside.items()}
        about = about_picture(read, str(path), summary)
        samples.append(Sample(stem, str(path), path, mask_of.get(stem), str(mask_of.get(stem)), about))
    for stem in mask_of.keys() - by_stem.keys():
        summary.leave_out(f"masks {NO_PHOTO}", mask_of[stem].relative_to(folder.parent).as_posix())
    _tell_of_others(folder, [p for p in files if not is_picture(p) and p not in texts], summary)
    return samples


def _by_stem(folder: Path, found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Files by the stem of their photo. Raises DataError for two of one."""
    table: dict[str, Path] = {}
    for stem, inside in found:
        path = folder / inside
        if stem in table:
            raise DataError(
                f"{table[stem]} and {path} have one name, and a concept's pictures are told apart by it.\n"
                "  Rename one, or move the folder of other versions of the same pictures elsewhere."
            )
        table[stem] = path
    return table


def _tell_of_others(folder: Path, files: Iterable[Path], summary: Summary) -> None:
    for path in files:
        text = path.suffix.lower() in (".json", *CAPTIONS)
        summary.leave_out(f"texts {NO_PHOTO}" if text else OTHER, path.relative_to(folder.parent).as_posix())


def about_picture(texts: Mapping[str, bytes], name: str, summary: Summary) -> dict[str, Any]:
    """What the texts of a picture say of it: its JSON, with the caption of a text file where the JSON has none.

    texts: by ending, ".json", ".txt" or ".caption". Raises DataError for a text that is not what its ending says.
    """
    stem = name.rpartition(".")[0]
    about = _fields(texts[".json"], f"{stem}.json") if ".json" in texts else {}
    captions = {end: _text(texts[end], f"{stem}{end}") for end in CAPTIONS if end in texts}
    if not about.get("caption"):
        about["caption"] = next(filter(None, captions.values()), about.get("caption"))
    if any(caption not in ("", about["caption"]) for caption in captions.values()):
        summary.choose(f"captions of {name} differ; taken is {about['caption']!r}.")
    return about


def _fields(data: bytes, name: str) -> dict[str, Any]:
    """A picture's JSON: concept, group and caption are texts or null; the rest is not looked at."""
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise DataError(f"{name} is not JSON: {err}.") from err
    wrong = not isinstance(about, dict) or any(
        not isinstance(about.get(k), str | None) for k in ("concept", "group", "caption")
    )
    if wrong:
        raise DataError(f"{name}: a table with the texts concept, group and caption is wanted.")
    return about


def _text(data: bytes, name: str) -> str:
    """A caption on one line."""
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as err:
        raise DataError(f"{name} is not UTF-8 text ({err}). Save the caption as UTF-8.") from err

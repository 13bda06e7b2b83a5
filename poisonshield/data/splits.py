"""Which folder or file is which split, as people spell it: Train, training_set, val2017, validation, TEST."""

import re
from collections.abc import Mapping
from pathlib import Path

from poisonshield.data.pictures import is_hidden
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
ARCHIVE_ENDINGS = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".rar", ".lzma", ".br")
"""Of archives that are not read: they are named, and not passed over."""

_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
}
_SPLIT_OF = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_NAME = re.compile(rf"({'|'.join(_SPLIT_OF)})[ _-]?(set|data|split|images|imgs)?[ _-]?(\d{{4}})?", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """ "train", "test", "val", or None for a name that is none of their spellings."""
    found = _NAME.fullmatch(name)
    return _SPLIT_OF[found[1].lower()] if found else None


def split_in(file_name: str, *, separators: str) -> str | None:
    """The split that a file's name holds between separators, or begins with: x-train-0.tar. The first one counts."""
    words = re.split(f"[{re.escape(separators)}]", file_name.lower())
    return next((_SPLIT_OF[word] for word in words[:-1] if word in _SPLIT_OF), None)


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))


def find_tars(folder: Path, pattern: str = "*") -> list[Path]:
    """The tars of a folder that are read, sorted, without hidden ones."""
    return sorted(
        p
        for p in folder.glob(pattern)
        if p.name.lower().endswith(TAR_ENDINGS) and not is_hidden(p.name) and p.is_file()
    )


def find_archives(folder: Path) -> list[str]:
    """Names of the archives of a folder that are not read."""
    return sorted(p.name for p in folder.iterdir() if p.name.lower().endswith(ARCHIVE_ENDINGS) and p.is_file())


def split_folders(src: Path, summary: Summary, *, classes: Mapping[str, str] | None = None) -> dict[str, Path]:
    """{"train": folder, "test": folder}, or {} if folders of src are no splits. classes: those that are none for sure.

    A folder called train is one class among others if they hold pictures and no folders. Raises DataError where two
    folders are one split, or splits have no train among them.
    """
    here = visible_folders(src)
    found: dict[str, list[Path]] = {}
    for path in here:
        if (split := split_of(path.name)) and path.name not in (classes or {}):
            found.setdefault(split, []).append(path)
    named = [path for paths in found.values() for path in paths]
    others = [path for path in here if path not in named]
    if not named or (others and not all(visible_folders(p) or find_tars(p) for p in named)):
        return {}
    for split, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(p.name for p in paths)
            raise DataError(f"{src} holds {names}, which are both the {split} split. Rename or move one of them.")
    for path in others:
        summary.leave_out("folders beside the splits", path.name)
    return {split: paths[0] for split, paths in choose_splits(found, src, summary).items()}


def choose_splits(found: dict[str, list[Path]], src: Path, summary: Summary) -> dict[str, list[Path]]:
    """Those of train, test and val that are read, as train and test, the choice told.

    Raises DataError for val and test without train.
    """
    shown = {
        split: paths[0].name + (f" and {len(paths) - 1} more" if paths[1:] else "") for split, paths in found.items()
    }
    if "train" not in found:
        raise DataError(
            f"{src} holds {', '.join(shown.values())}, and nothing called train. Are they splits or classes?\n"
            "  Splits: call one of them train, or import one alone by its path (tars: by --pattern).\n"
            "  Classes: name them in a class list (--class-list)."
        )
    chosen = {"train": found["train"]}
    if test := found.get("test") or found.get("val"):
        chosen["test"] = test
        summary.choose(
            f"{shown['train']} is the train split, {shown['test' if 'test' in found else 'val']} the test split."
        )
    if "test" in found and "val" in found:
        summary.leave_out("validation splits, as there is a test split (import it alone to have it)", shown["val"])
    return chosen

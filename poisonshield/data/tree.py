"""Class-folder trees as people keep them: which files belong to which class, and what each is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from poisonshield.data.pictures import find_pictures, is_picture, walk_files
from poisonshield.data.splits import find_archives, split_of, visible_folders
from poisonshield.data.summary import Summary
from poisonshield.errors import DataError
from poisonshield.registry import suggest

UNLABELLED = "unlabelled"
"""The one class of images without labels."""


@dataclass(frozen=True)
class Tree:
    """samples: (key, path, label), classes in order and paths sorted. left_out: how many files are no images;
    hidden ones do not count."""

    folders: tuple[str, ...]
    names: tuple[str, ...]
    samples: list[tuple[str, Path, int]]
    left_out: int


def list_tree(
    folder: Path,
    *,
    root: Path,
    summary: Summary,
    classes: Mapping[str, str] | None = None,
    exact: bool = False,
    may_lack: bool = False,
) -> Tree:
    """The images of one tree, found recursively under each class folder; keys are paths within `root`.

    classes: {folder: name} to take, in label order; None takes all folders, sorted. exact: other folders are an error.
    may_lack: classes without an image are none. Raises DataError for a class without images, folders that are in
    `classes` and not here, or two files that would get the same key.
    """
    here = [p.name for p in visible_folders(folder)]
    if not here:
        raise _nothing_here(folder)
    _tell_of_files_beside(folder, summary)
    if classes is None:
        _warn_of_splits(folder, here, summary)
    elif not may_lack:
        _refuse_missing(folder, here, classes)
    if classes and (extra := [name for name in here if name not in classes]):
        if exact:
            raise DataError(
                f"{folder} has {len(extra)} class folders that the train split lacks: {', '.join(extra[:5])}.\n"
                "  Remove them, or say with a class list which classes are meant."
            )
        for name in extra:
            summary.leave_out("folders that the class list does not name", name)
    classes = classes or {name: name for name in here}
    paths: list[tuple[Path, int]] = []
    left_out = 0
    for label, name in enumerate(classes):
        images, others = _sort_files(folder / name, root, summary)
        left_out += others
        if not images and may_lack:
            summary.leave_out(f"classes of train, without an image in {folder.name}", name)
        elif not images:
            raise DataError(f"class folder {folder / name} has no image. Fill it, or leave it out with a class list.")
        paths += [(path, label) for path in images]
    if not paths:
        raise DataError(f"{folder} has no image of any class. Fill it, or move it away.")
    return Tree(tuple(classes), tuple(classes.values()), _with_keys(paths, root), left_out)


def list_unlabelled(folder: Path, *, root: Path, summary: Summary) -> Tree:
    """All images of a folder, at any depth, as the one class "unlabelled"."""
    images, others = _sort_files(folder, root, summary)
    if not images:
        raise _nothing_here(folder)
    summary.choose(f"{folder.name} has no labels: all of its images are one class, {UNLABELLED!r}.")
    return Tree((UNLABELLED,), (UNLABELLED,), _with_keys([(path, 0) for path in images], root), others)


def is_flat(folder: Path) -> bool:
    """Whether a folder holds images and no folders."""
    return not visible_folders(folder) and bool(find_pictures(folder, nested=False))


def _sort_files(folder: Path, root: Path, summary: Summary) -> tuple[list[Path], int]:
    """(images, number of other files) below a folder; what is left out is told by its path within `root`."""
    passed_over: list[Path] = []
    files = walk_files(folder, passed_over=passed_over) if folder.is_dir() else []
    images = [p for p in files if is_picture(p)]
    for path in files:
        if not is_picture(path):
            summary.leave_out("files that are no images", path.relative_to(root).as_posix())
    for path in passed_over:
        summary.leave_out("hidden, linked or special files and folders", path.relative_to(root).as_posix())
    return images, len(files) - len(images)


def _with_keys(paths: list[tuple[Path, int]], root: Path) -> list[tuple[str, Path, int]]:
    taken: dict[str, Path] = {}
    samples = []
    for path, label in paths:
        key = path.relative_to(root).with_suffix("").as_posix().replace(".", "_")
        if key in taken:
            raise DataError(f"{path} and {taken[key]} would both be called {key}. Rename one of them.")
        taken[key] = path
        samples.append((key, path, label))
    return samples


def _refuse_missing(folder: Path, here: list[str], classes: Mapping[str, str]) -> None:
    if missing := [name for name in classes if name not in here]:
        hint = suggest(missing[0], here)
        if spaced := next((name for name in here if name.startswith(f"{missing[0]} ")), None):
            hint = f' Is it "{spaced}"? Write a name with spaces in quotes.'
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(classes)} class folders: {', '.join(missing[:5])}."
            f"{hint}\n  Correct the class list, or copy the folders there."
        )


def _tell_of_files_beside(folder: Path, summary: Summary) -> None:
    for path in find_pictures(folder, nested=False):
        summary.leave_out("images outside the class folders", path.name)
    for name in find_archives(folder):
        summary.leave_out("archives that are not read (unpack them first)", name)


def _warn_of_splits(folder: Path, here: list[str], summary: Summary) -> None:
    inner = {p.name for name in here for p in visible_folders(folder / name)}
    if inner and all(split_of(name) for name in inner):
        summary.choose(
            f"warning: the classes {', '.join(here[:5])} hold only {', '.join(sorted(inner))}, names of splits."
            f" Is {folder} one folder too high?"
        )
    elif all(split_of(name) for name in here):
        summary.choose(f"warning: the classes {', '.join(here)} have names of splits.")


def _nothing_here(folder: Path) -> DataError:
    archives = find_archives(folder)
    found = f" It holds archives that are not read, such as {archives[0]}: unpack them first." if archives else ""
    return DataError(
        f"{folder} holds neither class folders nor tar shards nor cifar-10-batches-py.{found}\n"
        "  Put the images of each class into a folder of its own: SRC/cat/1.jpg, SRC/dog/2.jpg. Images without\n"
        "  classes may lie in SRC itself."
    )

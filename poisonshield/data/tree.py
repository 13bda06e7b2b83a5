"""Class-folder trees as people keep them: which files belong to which class, and what each is called."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from poisonshield.data.pictures import is_picture, walk_files
from poisonshield.errors import DataError
from poisonshield.registry import suggest

SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}


@dataclass(frozen=True)
class Tree:
    """samples: (key, path, label), classes in order and paths sorted. left_out: how many files are no images;
    hidden ones do not count."""

    folders: tuple[str, ...]
    names: tuple[str, ...]
    samples: list[tuple[str, Path, int]]
    left_out: int


def split_folders(src: Path) -> dict[str, Path]:
    """{"train": src/train, "test": src/test or src/val ...}, or {} if src has no train folder."""
    found = {}
    for split, spellings in SPLITS.items():
        if here := next((src / s for s in spellings if (src / s).is_dir()), None):
            found[split] = here
    return found if "train" in found else {}


def read_class_list(path: str | Path) -> dict[str, str]:
    """{folder: class name} from lines `folder` or `folder name of the class`; order is label order, # begins a comment.

    Names that two folders share get the folder added. Raises DataError for a repeated folder or an empty list.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"class list {path} cannot be read: {err}. One folder name a line is wanted.") from err
    classes: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        folder, _, name = line.partition("#")[0].strip().partition(" ")
        if not folder:
            continue
        if folder in classes:
            raise DataError(f"{path}:{number}: folder {folder} is listed twice. Remove one of the lines.")
        classes[folder] = name.strip() or folder
    if not classes:
        raise DataError(f"class list {path} names no class. Write one folder name a line.")
    uses = Counter(classes.values())
    return {f: name if uses[name] == 1 else f"{name} ({f})" for f, name in classes.items()}


def list_tree(folder: Path, *, root: Path, classes: dict[str, str] | None = None, exact: bool = False) -> Tree:
    """The images of one tree, found recursively under each class folder; keys are paths within `root`.

    classes: {folder: name} to take, in label order; None takes all folders, sorted. exact: other folders are an error.
    Raises DataError for a class without images, folders that are in `classes` and not here, or two files that would get
    the same key.
    """
    here = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not here:
        raise DataError(
            f"{folder} holds neither class folders nor tar shards nor cifar-10-batches-py.\n"
            "  Put the images of each class into a folder of its own: SRC/cat/1.jpg, SRC/dog/2.jpg"
        )
    classes = classes or {name: name for name in here}
    if missing := [name for name in classes if name not in here]:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(classes)} class folders: {', '.join(missing[:5])}."
            f"{suggest(missing[0], here)}\n  Correct the class list, or copy the folders there."
        )
    if exact and (extra := [name for name in here if name not in classes]):
        raise DataError(
            f"{folder} has {len(extra)} class folders that the train split lacks: {', '.join(extra[:5])}.\n"
            "  Remove them, or say with a class list which classes are meant."
        )
    samples, left_out = [], 0
    taken: dict[str, Path] = {}
    for label, name in enumerate(classes):
        files = walk_files(folder / name)
        images = [p for p in files if is_picture(p)]
        left_out += len(files) - len(images)
        if not images:
            raise DataError(f"class folder {folder / name} has no image. Fill it, or leave it out with a class list.")
        for path in images:
            key = path.relative_to(root).with_suffix("").as_posix().replace(".", "_")
            if key in taken:
                raise DataError(f"{path} and {taken[key]} would both be called {key}. Rename one of them.")
            taken[key] = path
            samples.append((key, path, label))
    return Tree(tuple(classes), tuple(classes.values()), samples, left_out)

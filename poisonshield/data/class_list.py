"""A class list: which folders are the classes, in label order, and what each class is called."""

import re
from collections import Counter
from pathlib import Path

from poisonshield.errors import DataError
from poisonshield.files import read_bounded

MAX_BYTES = 2**24
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')


def read_class_list(path: str | Path) -> dict[str, str]:
    r"""{folder: class name} from a file with one class a line; order is label order.

        n01440764                     a folder
        n01440764 tench, Tinca tinca  a folder and what the class is called
        "great dane" Great Dane       a folder with spaces or # in its name; \" stands for a quote
        great dane<TAB>Great Dane     the same with a tab behind the folder; nothing in such a line is a comment

    Elsewhere # begins a comment, at the start of a line or after a space. The file is UTF-8, with or without a mark at
    its start. Names that two folders share get the folder added. Raises DataError for a repeated folder, an empty list
    or a quote that does not end.
    """
    classes: dict[str, str] = {}
    for number, line in enumerate(_lines(Path(path)), 1):
        folder, name = _parse(line, where=f"{path}:{number}")
        if not folder:
            continue
        if folder in classes:
            raise DataError(f"{path}:{number}: folder {folder} is listed twice. Remove one of the lines.")
        classes[folder] = name or folder
    if not classes:
        raise DataError(f"class list {path} names no class. Write one folder name a line.")
    uses = Counter(classes.values())
    return {f: name if uses[name] == 1 else f"{name} ({f})" for f, name in classes.items()}


def _lines(path: Path) -> list[str]:
    try:
        return read_bounded(path, max_bytes=MAX_BYTES, what="class list").decode("utf-8-sig").splitlines()
    except ValueError as err:  # a DataError too
        raise DataError(
            f"class list {path} cannot be read: {err}\n  One folder name a line is wanted, in UTF-8."
        ) from err


def _parse(line: str, *, where: str) -> tuple[str, str]:
    if "\t" in line.lstrip() and not line.lstrip().startswith(("#", '"')):
        folder, _, name = line.strip().partition("\t")
        return folder.strip(), name.strip()
    line = line.strip()
    if line.startswith('"'):
        if not (found := _QUOTED.fullmatch(line)):
            raise DataError(f'{where}: the quote of {line} does not end. Write "folder name" and then the class name.')
        return re.sub(r"\\(.)", r"\1", found[1]), _without_comment(found[2])
    folder, _, name = _without_comment(line).partition(" ")
    return folder, name.strip()


def _without_comment(text: str) -> str:
    return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()

"""YAML -> one merged tree that remembers where each key came from.

One file is one experiment: `extends:` names a parent, `key.path=value` overrides. This module knows no concrete class.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poisonshield.config.reading import MAX_DEPTH, read_file, read_value
from poisonshield.config.shipped import find_config, is_there
from poisonshield.errors import ConfigError

MAX_PARENTS = 20
"""Files that one config may stand on."""
_ENTRY = re.compile("[0-9]{1,9}")  # the number of an entry of a list


@dataclass
class Tree:
    """Plain nested dicts and lists, and where each path came from: ("defenses", 0, "eps") -> "file.yaml:18"."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[tuple, str] = field(default_factory=dict)
    said: dict[tuple, int] = field(default_factory=dict)
    changed: dict[tuple, int] = field(default_factory=dict)
    """In which layer a path was said last, and given another value than it had: 0 is the file that extends none, 1 the
    one that extends it, and so on, and overrides are the last."""
    top: int = 0
    """The last layer of the files."""

    def where(self, path: tuple) -> str:
        """The file and line of a path; if it has none, of the first thing within it, else of its nearest ancestor."""
        if path not in self.marks:
            path = next((p for p in self.marks if path and p[: len(path)] == path), path)
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, "config")

    def is_later(self, path: tuple, other: tuple) -> bool:
        """Whether a path got another value, by a child file or an override, and nothing at the other was said since."""
        return _last(self.changed, path) > _last(self.said, other)


def _last(layers: dict[tuple, int], path: tuple) -> int:
    """The last layer that has to do with a path, what is above it or what is within it."""
    above = [layers.get(path[:length], 0) for length in range(len(path))]
    return max(above + [layer for place, layer in layers.items() if place[: len(path)] == path], default=0)


def load_tree(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """The merged tree of a YAML file, its `extends:` parents and `key.path=value` overrides.

    path: of a file, or the name of a shipped config, such as `defend/vespr_in100`.
    Dicts merge, anything else replaces. A changed `name:` starts its block afresh, since the other settings of the
    block belonged to the old name. Raises ConfigError for missing files, bad YAML and impossible overrides.
    """
    tree = _load_file(find_config(path), ())
    for text in _names_first(overrides):
        override(tree, text)
    return tree


def _names_first(overrides: Iterable[str]) -> list[str]:
    """The overrides in their order, but `block.name=` before the block's other settings, which it would discard."""
    ordered: list[str] = []
    for text in overrides:
        block, dot, last = text.partition("=")[0].rpartition(".")
        at = len(ordered)
        if dot and last == "name":
            at = next((i for i, earlier in enumerate(ordered) if earlier.startswith(f"{block}.")), at)
        ordered.insert(at, text)
    return ordered


def _load_file(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends:` leads back to the same file. Remove one of the two lines.")
    if len(seen) == MAX_PARENTS:
        raise ConfigError(f"{path}: `extends:` leads through {MAX_PARENTS} files. Join some of them.")
    if not is_there(path):
        raise ConfigError(
            f"{path} does not exist (named by `extends:` in {seen[-1]}). Give a path relative to the file that says it."
        )
    values, marks = read_file(path)
    tree = Tree({} if values is None else values, marks)
    if not isinstance(tree.values, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, not a {type(tree.values).__name__}.")
    parent = tree.values.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{tree.where(('extends',))}: extends names one file, not a {type(parent).__name__}.")
    base = _load_file(Path(os.path.normpath(path.parent / parent)), (*seen, path.resolve()))
    return _merge(base, tree)


def _forget(marks: dict[tuple, str], path: tuple) -> None:
    for known in [p for p in marks if p[: len(path)] == path]:
        del marks[known]


def _merge(base: Tree, child: Tree) -> Tree:
    """What the child says, and what it leaves of its base."""
    replaced: dict[tuple, bool] = {}
    values, top = _merge_values(base.values, child.values, (), replaced), base.top + 1

    def is_the_childs(path: tuple) -> bool:
        return any(path[:length] in replaced for length in range(len(path) + 1))

    marks = {path: mark for path, mark in base.marks.items() if not is_the_childs(path)}
    marks |= {path: mark for path, mark in child.marks.items() if is_the_childs(path)}
    said = base.said | dict.fromkeys(replaced, top)
    return Tree(values, marks, said, base.changed | {path: top for path, new in replaced.items() if new}, top)


def _merge_values(old: Any, new: Any, path: tuple, replaced: dict[tuple, bool]) -> Any:
    """replaced: takes the paths that the new values have, and whether they had others."""
    renamed = isinstance(old, dict) and isinstance(new, dict) and "name" in new and new["name"] != old.get("name")
    if isinstance(old, dict) and isinstance(new, dict) and not renamed:
        out = dict(old)
        for key, value in new.items():
            out[key] = _merge_values(old.get(key), value, (*path, key), replaced)
        return out
    replaced[path] = old != new
    return new


def override(tree: Tree, text: str) -> None:
    """Change the tree as `key.path=value` says. Raises ConfigError for what is no such text, or an impossible path."""
    key, sep, raw = text.partition("=")
    if not sep or not key:
        raise ConfigError(
            f"{text!r} is not an override. Write key.path=value, for example seed=1 or defenses.0.eps=4/255."
        )
    value = read_value(raw, label=repr(text))
    parts = tuple(int(p) if _ENTRY.fullmatch(p) else p for p in key.split("."))
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"{text!r}: no setting lies {len(parts)} deep.")
    here: Any = tree.values
    for i, part in enumerate(parts):
        at = ".".join(str(p) for p in parts[: i + 1])
        last = i == len(parts) - 1
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise ConfigError(f"{text!r}: {at} does not exist; the list has {len(here)} entries, counted from 0.")
        elif isinstance(here, dict):
            part = str(part)
            if not last and not isinstance(here.get(part), (dict, list)):
                # `mask: grabcut` and mask.side=0.5: a bare name is a block that has only its name yet
                here[part] = {"name": here[part]} if isinstance(here.get(part), str) else {}
        else:
            raise ConfigError(f"{text!r}: {at} lies inside a plain value.")
        if last:
            if part == "name" and here.get("name") not in (None, value):
                here.clear()
                _forget(tree.marks, parts[:-1])
            _forget(tree.marks, parts)
            before = here.get(part) if isinstance(here, dict) else here[part]
            tree.said[parts] = tree.top + 1
            if before != value:
                tree.changed[parts] = tree.top + 1
            here[part] = value
            tree.marks[parts] = f"command line: {text}"
        else:
            here = here[part]

"""YAML -> checked settings. One file is one experiment: `extends:` names a parent, `key.path=value` overrides.

This module knows no concrete class: it merges trees, remembers which file and line each key came from, and turns
pydantic's complaints into one worded ConfigError that lists every problem at once. Every `Config` of the project
derives from `Settings`; budgets are typed `Pixels`, so that `8/255` is accepted and `8` is refused with a hint.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from poisonshield.errors import ConfigError
from poisonshield.registry import Registry, suggest

_FRACTION = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*")


def _fraction(value: Any) -> Any:
    """'8/255' -> 0.0314; anything else unchanged, for pydantic to judge."""
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if float(match[2]) == 0:
        raise ValueError(f"{value} divides by zero")
    return float(match[1]) / float(match[2])


def _pixel_range(value: float) -> float:
    if not 0 <= value <= 1:
        hint = f" Did you mean {value:g}/255?" if 1 < value <= 255 else ""
        raise ValueError(f"{value:g} is outside [0, 1]: budgets are in pixel units.{hint}")
    return value


Number = Annotated[float, BeforeValidator(_fraction)]
"""A float that may be written as a fraction."""

Pixels = Annotated[float, BeforeValidator(_fraction), AfterValidator(_pixel_range)]
"""A distance between pixels in [0, 1]; may be written as a fraction such as 8/255."""


class Settings(BaseModel):
    """Parent of every Config: unknown keys are refused and nothing changes after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Choice:
    """A block with a `name:`: the class that the name picks, and its checked Config."""

    name: str
    cls: type
    config: Any


@dataclass
class Tree:
    """Plain nested dicts and lists, and where each path came from: ("defenses", 0, "eps") -> "file.yaml:18"."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[tuple, str] = field(default_factory=dict)

    def where(self, path: tuple) -> str:
        """The file and line of a path; if it has none, of the first thing within it, else of its nearest ancestor."""
        if path not in self.marks:
            path = next((p for p in self.marks if path and p[: len(path)] == path), path)
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, "config")


def load_tree(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """The merged tree of a YAML file, its `extends:` parents and `key.path=value` overrides.

    Dicts merge, anything else replaces. A changed `name:` starts its block afresh, since the other settings of the
    block belonged to the old name. Raises ConfigError for missing files, bad YAML and impossible overrides.
    """
    tree = _load_file(Path(path), ())
    for text in _names_first(overrides):
        _override(tree, text)
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
    if not path.is_file():
        asked = f" (named by `extends:` in {seen[-1]})" if seen else ""
        raise ConfigError(f"{path} does not exist{asked}. Give the path of a YAML file, for example from configs/.")
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        tree = Tree()
        tree.values = _plain(node, (), str(path), tree.marks) if node is not None else {}
    except yaml.YAMLError as err:
        raise ConfigError(f"{path} is not valid YAML: {err}") from err
    if not isinstance(tree.values, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, not a {type(tree.values).__name__}.")
    parent = tree.values.pop("extends", None)
    if parent is None:
        return tree
    base = _load_file(Path(os.path.normpath(path.parent / parent)), (*seen, path.resolve()))
    base.values = _merge(base, tree, base.values, tree.values, ())
    return base


def _plain(node: yaml.Node, path: tuple, file: str, marks: dict[tuple, str]) -> Any:
    marks[path] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key in out:
                raise ConfigError(f"{file}:{key_node.start_mark.line + 1}: {key} stands twice in one block. Keep one.")
            out[key] = _plain(value_node, (*path, key), file, marks)
            marks[(*path, key)] = f"{file}:{key_node.start_mark.line + 1}"
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), file, marks) for i, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node)


def _forget(marks: dict[tuple, str], path: tuple) -> None:
    for known in [p for p in marks if p[: len(path)] == path]:
        del marks[known]


def _merge(into: Tree, child: Tree, old: Any, new: Any, path: tuple) -> Any:
    renamed = isinstance(old, dict) and isinstance(new, dict) and "name" in new and new["name"] != old.get("name")
    if isinstance(old, dict) and isinstance(new, dict) and not renamed:
        out = dict(old)
        for key, value in new.items():
            out[key] = _merge(into, child, old.get(key), value, (*path, key))
        return out
    _forget(into.marks, path)
    into.marks.update({p: m for p, m in child.marks.items() if p[: len(path)] == path})
    return new


def _override(tree: Tree, text: str) -> None:
    key, sep, raw = text.partition("=")
    if not sep or not key:
        raise ConfigError(
            f"{text!r} is not an override. Write key.path=value, for example seed=1 or defenses.0.eps=4/255."
        )
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as err:
        raise ConfigError(f"{text!r}: the value is not valid YAML: {err}") from err
    parts = tuple(int(p) if p.isdigit() else p for p in key.split("."))
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
                here[part] = {}
        else:
            raise ConfigError(f"{text!r}: {at} lies inside a plain value.")
        if last:
            if part == "name" and here.get("name") not in (None, value):
                here.clear()
                _forget(tree.marks, parts[:-1])
            _forget(tree.marks, parts)
            here[part] = value
            tree.marks[parts] = f"command line: {text}"
        else:
            here = here[part]


class Checker:
    """Checks parts of a tree against Settings classes and collects every problem before raising once."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.problems = tree, []

    def settings(self, schema: type[BaseModel], path: tuple, values: Any, *, owner: str) -> Any:
        """The schema filled with values, or None with the problems noted. owner is the name used in messages."""
        try:
            return schema.model_validate(values if values is not None else {})
        except ValidationError as err:
            for item in err.errors():
                self._note(schema, path, item, owner)
            return None

    def choice(self, registry: Registry, path: tuple, values: Any) -> Choice | None:
        """The class and Config of a block with `name:`, or None with the problems noted."""
        label = _dotted(path)
        if isinstance(values, str):
            values = {"name": values}
        if not isinstance(values, dict) or "name" not in values:
            self.problem(path, f"{label} needs `name:`, one of {', '.join(registry.names())}.")
            return None
        try:
            cls = registry.get(values["name"])
        except ConfigError as err:
            self.problem((*path, "name"), f"{label}.name: {err}")
            return None
        rest = {k: v for k, v in values.items() if k != "name"}
        config = self.settings(cls.Config, path, rest, owner=values["name"])
        return None if config is None else Choice(values["name"], cls, config)

    def problem(self, path: tuple, text: str) -> None:
        """Note a problem at a path."""
        self.problems.append(f"{self.tree.where(path)}: {text}")

    def finish(self) -> None:
        """Raise ConfigError with all problems, if any."""
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(self.problems)))

    def _note(self, schema: type[BaseModel], base: tuple, item: dict[str, Any], owner: str) -> None:
        path = (*base, *item["loc"])
        label = _dotted(path)
        if item["type"] == "extra_forbidden":
            fields, name = _fields_at(schema, item["loc"][:-1]), owner
            inner = _dotted((*base, *item["loc"][:-1]))
            if len(item["loc"]) > 1:
                name = inner
            text = f"{label} is not a setting of {name}.{suggest(str(item['loc'][-1]), fields)}  Settings: {', '.join(sorted(fields))}"
        elif item["type"] == "missing":
            text = f"{label} is missing; {owner} needs it."
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = (
                ""
                if isinstance(item["input"], (dict, list)) or str(item["input"]) in message
                else f" (given: {item['input']!r})"
            )
            text = f"{label}: {message}{given}" if label else f"{message}"
        self.problem(path, text)


def _fields_at(schema: Any, loc: tuple) -> list[str]:
    for part in loc:
        schema = schema.model_fields[part].annotation if part in getattr(schema, "model_fields", {}) else schema
    return list(getattr(schema, "model_fields", {}))


def _dotted(path: tuple) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def dump(resolved: Any, written: Any) -> Any:
    """Checked values with defaults, as plain data; fractions stay as they were written."""
    if isinstance(resolved, BaseModel):
        resolved = resolved.model_dump(mode="json")
    if isinstance(written, str) and _FRACTION.fullmatch(written):
        return written
    if isinstance(resolved, dict):
        source = written if isinstance(written, dict) else {}
        return {k: dump(v, source.get(k)) for k, v in resolved.items()}
    if isinstance(resolved, (list, tuple)):
        source = written if isinstance(written, list) and len(written) == len(resolved) else [None] * len(resolved)
        return [dump(v, w) for v, w in zip(resolved, source, strict=True)]
    return resolved

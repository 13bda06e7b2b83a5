"""YAML text -> plain values, and the place of each: the one reader of YAML that others wrote.

It makes tables, lists, text, numbers, true, false and null, and nothing else; what the text may grow to is bounded.
Dates stay the text that they are. A setting of 64 bits is the largest number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from poisonshield.errors import ConfigError, DataError
from poisonshield.files import read_bounded

MAX_BYTES = 2**18
"""Of one file: a config of thousands of lines, read in seconds."""
MAX_VALUES = 20_000
"""Of one text, with every alias written out."""
MAX_DEPTH = 50
"""Tables and lists within each other."""

Place = Callable[[int], str]
"""How errors call a line, counted from 0."""

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "value", "merge")}
_MADE = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Stops at a depth that no config has, before Python runs out of stack."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_too_deep(), problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_file(path: Path) -> tuple[Any, dict[tuple, str]]:
    """The values of a YAML file (None of an empty one), and "file:line" of each path to one of them.

    Raises ConfigError for what is no plain file, or too large, and as `read_text` does.
    """
    try:
        content = read_bounded(path, max_bytes=MAX_BYTES, what="config")
    except DataError as err:
        raise ConfigError(str(err)) from err
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        raise ConfigError(
            f"{path}:{line}: the byte {content[err.start]:#04x} is not UTF-8. Save the file as UTF-8, for example with "
            "`iconv -f latin1 -t utf8`."
        ) from err
    return read_text(text, lambda line: f"{path}:{line + 1}")


def read_value(text: str, *, label: str) -> Any:
    """The value of a text from the command line. label: how errors call it. Raises ConfigError as `read_text` does."""
    return read_text(text, lambda _: label)[0]


def read_text(text: str, place: Place) -> tuple[Any, dict[tuple, str]]:
    """The values of a text, and the place of each path to one of them.

    Raises ConfigError, with the place, for what is not valid YAML, for tags, numbers beyond 64 bits and characters that
    no name can have, and for what is too deep or too much once its aliases are written out.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position)
        raise ConfigError(f"{place(line)}: not valid YAML: the character U+{ord(text[err.position]):04X}.") from err
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        told = ", ".join(filter(None, (err.context, err.problem)))
        raise ConfigError(f"{place(mark.line if mark else 0)}: not valid YAML: {told}.") from err
    except (yaml.YAMLError, ValueError, OverflowError) as err:
        raise ConfigError(f"{place(0)}: not valid YAML: {err}.") from err
    writer = _Writer(place)
    return (None if node is None else writer.plain(node, ())), writer.marks


class _Writer:
    """Writes nodes out as plain values."""

    def __init__(self, place: Place) -> None:
        self.place, self.count = place, 0
        self.marks: dict[tuple, str] = {}

    def plain(self, node: yaml.Node, path: tuple) -> Any:
        """The value of a node. path: of keys and numbers that lead to it."""
        self.marks[path] = self.where(node)
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(
                f"{self.where(node)}: more than {MAX_VALUES:,} values, with every alias (`*name`) written out. "
                "Write less, or in several files."
            )
        if len(path) > MAX_DEPTH:  # an alias of what it stands in leads here
            raise ConfigError(f"{self.where(node)}: {_too_deep()}.")
        if isinstance(node, yaml.MappingNode):
            self.expect_tag(node, "map")
            return self.table(node, path)
        if isinstance(node, yaml.SequenceNode):
            self.expect_tag(node, "seq")
            return [self.plain(item, (*path, i)) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def table(self, node: yaml.MappingNode, path: tuple) -> dict[str, Any]:
        """A table, whose keys are text as they stand."""
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.where(key_node)}: a key is a name, not a table or a list.")
            key = self.text(key_node)
            if key in out:
                raise ConfigError(f"{self.where(key_node)}: {key} stands twice in one block. Keep one.")
            out[key] = self.plain(value_node, (*path, key))
            self.marks[(*path, key)] = self.where(key_node)
        return out

    def scalar(self, node: yaml.Node) -> Any:
        """Text, number, true, false or null."""
        text = self.text(node)
        if node.tag in _PLAIN:
            return text
        if node.tag not in _MADE:
            self.refuse_tag(node)
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except (ValueError, KeyError) as err:
            raise ConfigError(
                f"{self.where(node)}: {shorten(text)} is no {_kind(node)} that can be read. Put a text into quotes."
            ) from err
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{self.where(node)}: {shorten(text)} is beyond 64 bits. Give a smaller number.")
        return value

    def text(self, node: yaml.Node) -> str:
        """What a scalar says. Raises ConfigError for characters that no file name and no screen takes."""
        for letter in node.value:
            if letter == "\0" or "\ud800" <= letter <= "\udfff":
                raise ConfigError(f"{self.where(node)}: a text holds the character U+{ord(letter):04X}. Remove it.")
        return str(node.value)

    def expect_tag(self, node: yaml.Node, kind: str) -> None:
        """Raise ConfigError for a table or list that says it is something else."""
        if node.tag != f"tag:yaml.org,2002:{kind}":
            self.refuse_tag(node)

    def refuse_tag(self, node: yaml.Node) -> None:
        """Raise ConfigError for a tag, which asks to make an object."""
        raise ConfigError(
            f"{self.where(node)}: the tag {shorten(node.tag)} is not read; a config holds plain values. Remove it."
        )

    def where(self, node: yaml.Node) -> str:
        """The place of a node."""
        return self.place(node.start_mark.line)


def _too_deep() -> str:
    return f"tables or lists stand within each other more than {MAX_DEPTH} deep"


def _kind(node: yaml.Node) -> str:
    return {"int": "whole number", "float": "number"}.get(node.tag.rpartition(":")[2], "value")


def shorten(text: str) -> str:
    """The text, or its beginning and its length."""
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"

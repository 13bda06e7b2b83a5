"""Settings as YAML with a comment beside each: the words are those of the setting's own field.

steps: 10                  # Moves up the objective.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from poisonshield.config.check import Choice

_COLUMN = 34  # where comments start, unless the line is longer

Notes = Mapping[str, Any]
"""By setting: its words, and the Notes of what is inside it (a list of them for a list)."""


def notes_of(settings: Any) -> Any:
    """The words of checked settings: a model's by field, a Choice's with its class's first line, a list's by entry."""
    if isinstance(settings, Choice):
        first = (settings.cls.__doc__ or "").strip().partition("\n")[0]
        return {"name": (first, None)} | notes_of(settings.config)
    if isinstance(settings, BaseModel):
        fields = type(settings).model_fields
        return {name: (field.description, notes_of(getattr(settings, name))) for name, field in fields.items()}
    if isinstance(settings, list | tuple):
        return [notes_of(item) for item in settings]
    return None


def describe_yaml(record: Mapping[str, Any], notes: Notes) -> str:
    """The record as YAML, which reads back as the same values, with the notes as comments."""
    return "\n".join(_lines(record, notes, ""))


def _lines(record: Mapping[str, Any], notes: Notes | None, indent: str) -> list[str]:
    lines = []
    for key, value in record.items():
        words, inside = (notes or {}).get(key) or (None, None)
        if isinstance(value, Mapping) and value:
            lines += [_beside(f"{indent}{key}:", words), *_lines(value, inside, indent + "  ")]
        elif _holds_blocks(value):
            lines += [_beside(f"{indent}{key}:", words), *_entries(value, inside, indent)]
        else:
            lines.append(_beside(f"{indent}{key}: {_scalar(value)}", words))
    return lines


def _entries(blocks: Sequence[Mapping[str, Any]], notes: Any, indent: str) -> list[str]:
    """A list of blocks, each after a dash."""
    lines = []
    for i, block in enumerate(blocks):
        first, *rest = _lines(block, notes[i] if notes else None, f"{indent}  ")
        lines += [f"{indent}- {first.removeprefix(f'{indent}  ')}", *rest]
    return lines


def _holds_blocks(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) and v for v in value)


def _beside(line: str, words: str | None) -> str:
    return line if not words else f"{line:{_COLUMN}}  # {words}"


def _scalar(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")

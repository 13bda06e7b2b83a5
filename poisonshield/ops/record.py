"""Records of arguments and the flat lists that torch.library needs: the only place where one becomes the other.

Each op takes one record, a NamedTuple, so that every backend reads names instead of positions. A field is a tensor, a
tensor or None, a str, int, float, bool or dtype, or a record of such fields. The first field is always a tensor.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
}


def flatten(record: tuple[Any, ...]) -> list[Any]:
    """The values of all fields in order, those of inner records in their place."""
    flat: list[Any] = []
    for value in record:
        if isinstance(value, tuple):
            flat.extend(flatten(value))
        else:
            flat.append(value)
    return flat


def rebuild(kind: Any, values: Iterable[Any]) -> Any:
    """A record of class `kind` from what `flatten` gave; from other values too, such as a bool for each field."""
    left = iter(values)
    return kind(*(next(left) if inner is None else rebuild(inner, left) for inner in _inner_records(kind)))


def flat_fields(kind: Any) -> Iterator[tuple[str, str]]:
    """(name, type in a schema) of each value that `flatten` gives."""
    for name, annotation in get_type_hints(kind).items():
        if _is_record(annotation):
            yield from flat_fields(annotation)
        else:
            yield name, _SCHEMA_TYPES[annotation]


def tensors(record: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among all fields."""
    return [v for v in flatten(record) if isinstance(v, Tensor)]


@cache
def _inner_records(kind: Any) -> tuple[type[Any] | None, ...]:
    """For each field its record class, or None for a plain value."""
    return tuple(k if _is_record(k) else None for k in get_type_hints(kind).values())


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple)

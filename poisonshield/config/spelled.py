"""A block of settings as one word: `jpeg:75`, `sdedit:0.3,steps=50`, for command lines and lists."""

from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel

from poisonshield.config.check import Checker, Choice, pick
from poisonshield.config.reading import read_value
from poisonshield.config.tree import Tree
from poisonshield.errors import ConfigError
from poisonshield.registry import Registry, with_article


def read_spelled(text: str, settings_of: Callable[[str], type[BaseModel]], *, kind: str) -> dict[str, Any]:
    """The block of a text: NAME, NAME:VALUE of its first setting, or NAME:KEY=VALUE, parts parted by commas.

    settings_of: the Config of a name, which raises ConfigError for an unknown one. kind: what it is called in messages.
    Settings are not checked. Raises ConfigError for a value of no setting.
    """
    name, colon, rest = text.partition(":")
    fields = settings_of(name).model_fields
    block: dict[str, Any] = {"name": name}
    for i, part in enumerate(rest.split(",") if colon else ()):
        key, equals, value = part.partition("=")
        if not equals:
            if i > 0 or not part or not fields:
                raise ConfigError(
                    f"{text!r} is not {with_article(kind)}. Write NAME, NAME:VALUE or NAME:KEY=VALUE,KEY=VALUE."
                )
            key, value = next(iter(fields)), part
        exact = key in fields and value in get_args(fields[key].annotation)  # "420" is a text there
        block[key] = value if exact else read_value(value, label=repr(text))
    return block


def pick_spelled(text: str, registry: Registry, **more: Any) -> Choice:
    """What a text picks from a registry, checked. more: settings beside those of the text.

    Raises ConfigError with the nearest name, or with every problem of the settings.
    """
    block = read_spelled(text, lambda name: pick((registry,), name).Config, kind=registry.kind)
    checker = Checker(Tree())
    choice = checker.choice((registry,), (), block | more)
    if choice is None:
        raise ConfigError("; ".join(problem for _, problem in checker.found))
    return choice

"""Purifiers by name, for defenses that take one as a part: those of every training, and those of this folder."""

from typing import Any

from poisonshield.config import Checker, Tree
from poisonshield.config.spelled import read_spelled
from poisonshield.defenses.base import Context, Defense
from poisonshield.errors import ConfigError
from poisonshield.registry import Registry, suggest

_FOLDERS = (
    Registry("poisonshield.defenses", kind="purifier"),
    Registry("poisonshield.defenses.diffusion", kind="purifier"),
)


def purifier_block(value: Any) -> dict[str, Any] | None:
    """null, a text (see parse_purifier) or a block with `name:`, as a block with all settings. Raises ConfigError."""
    if value is None:
        return None
    block = parse_purifier(value) if isinstance(value, str) else value
    if not isinstance(block, dict) or not isinstance(block.get("name"), str):
        raise ConfigError("a name such as jpeg, a block with `name:`, or null is wanted")
    cls, name = _find_class(block["name"]), block["name"]
    checker = Checker(Tree())
    config = checker.settings(cls.Config, (), {k: v for k, v in block.items() if k != "name"}, owner=name)
    if config is None:
        raise ConfigError("; ".join(text for _, text in checker.found))
    return {"name": name, **config.model_dump(mode="json")}


def parse_purifier(text: str) -> dict[str, Any]:
    """The block of a text such as jpeg:75, see read_spelled. Raises ConfigError for an unknown name, too."""
    return read_spelled(text, lambda name: _find_class(name).Config, kind="purifier")


def build_purifier(block: dict[str, Any] | None, *, seed: int) -> Defense | None:
    """The purifier of a checked block."""
    if block is None:
        return None
    cls = _find_class(block["name"])
    return cls(cls.Config(**{k: v for k, v in block.items() if k != "name"}), Context(seed))


def _find_class(name: str) -> type[Defense]:
    for folder in _FOLDERS:
        # Names first: to ask a class whether it purifies is to import its file.
        if name in folder.names() and (cls := _purifier_class(folder, name)):
            return cls
    known = sorted(n for folder in _FOLDERS for n in folder.names() if _purifier_class(folder, n))
    raise ConfigError(f"{name!r} is not a purifier.{suggest(name, known)}  Known: {', '.join(known)}")


def _purifier_class(folder: Registry, name: str) -> type[Defense] | None:
    cls: Any = folder.get(name)
    return cls if cls.purifier else None

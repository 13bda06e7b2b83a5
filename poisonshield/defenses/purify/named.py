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
    """null, a text (see spelled), or a block with `name:` as a block with all settings. Raises ConfigError with what is wrong."""
    if value is None:
        return None
    block = spelled(value) if isinstance(value, str) else value
    if not isinstance(block, dict) or not isinstance(block.get("name"), str):
        raise ConfigError("a name such as jpeg, a block with `name:`, or null is wanted")
    cls, name = _class(block["name"]), block["name"]
    checker = Checker(Tree())
    config = checker.settings(cls.Config, (), {k: v for k, v in block.items() if k != "name"}, owner=name)
    if config is None:
        raise ConfigError("; ".join(p.removeprefix("config: ") for p in checker.problems))
    return {"name": name, **config.model_dump(mode="json")}


def spelled(text: str) -> dict[str, Any]:
    """The block of a text such as jpeg:75, see read_spelled. Raises ConfigError for an unknown name, too."""
    return read_spelled(text, lambda name: _class(name).Config, kind="purifier")


def build_purifier(block: dict[str, Any] | None, *, seed: int) -> Defense | None:
    """The purifier of a checked block."""
    if block is None:
        return None
    cls = _class(block["name"])
    return cls(cls.Config(**{k: v for k, v in block.items() if k != "name"}), Context(seed))


def _class(name: str) -> type[Defense]:
    for folder in _FOLDERS:
        if name in folder.names() and folder.get(name).purifier:
            return folder.get(name)
    known = sorted(n for folder in _FOLDERS for n in folder.names() if folder.get(n).purifier)
    raise ConfigError(f"{name!r} is not a purifier.{suggest(name, known)}  Known: {', '.join(known)}")

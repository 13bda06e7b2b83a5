"""Name -> class by scanning one folder: the file `poisons/lsp.py` is the poison `lsp`, nothing to register.
A folder inside it is a registry of its own (`poisons/diffusion/` holds poisons of another kind).

Listing names imports nothing; asking for one imports that file only. The trade-off: a file holds exactly one
public class of its kind, which is the house rule anyway.
"""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from poisonshield.errors import ConfigError


def suggest(word: str, known: list[str]) -> str:
    """' Did you mean lsp?' if a known word is near, else ''."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def with_article(noun: str) -> str:
    """'a poison', 'an attack'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Registry:
    """The classes of one folder, e.g. `Registry("poisonshield.poisons", kind="poison")`."""

    def __init__(self, package: str, *, kind: str) -> None:
        self.package, self.kind = package, kind

    def names(self) -> list[str]:
        """All names, sorted, without importing them."""
        path = importlib.import_module(self.package).__path__
        return sorted(
            m.name
            for m in pkgutil.iter_modules(path)
            if m.name != "base" and not m.name.startswith("_") and not m.ispkg
        )

    def get(self, name: Any) -> type:
        """The class called `name`. Raises ConfigError with the nearest name."""
        if not isinstance(name, str) or name not in self.names():
            raise ConfigError(
                f"{name!r} is not {with_article(self.kind)}.{suggest(str(name), self.names())}  "
                f"Known: {', '.join(self.names())}"
            )
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            c
            for _, c in inspect.getmembers(module, inspect.isclass)
            if c.__module__ == module.__name__ and getattr(c, "name", None) == name
        ]
        if len(found) != 1:
            raise ConfigError(
                f"{module.__file__} must define one class with name = {name!r} to be {with_article(self.kind)}; "
                f"it has {len(found)}."
            )
        return found[0]

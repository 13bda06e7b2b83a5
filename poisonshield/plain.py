"""Text of a stranger's file as it may be shown: control characters written out, so that no terminal obeys them."""

import re
import unicodedata
from typing import Any

_COMMANDS = {"Cc", "Cs", "Zl", "Zp"}  # controls, halves of characters, separators of lines and paragraphs
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_JOINERS = "\u200c\u200d"  # without them some scripts cannot be written
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e\u00a1-\u00ac\u00ae-\u02ff]")


def is_plain(text: str) -> bool:
    """Whether nothing in a text steers a terminal or turns its direction."""
    return text.isprintable() or not any(map(_steers, text))


def plain(text: str) -> str:
    r"""The text with each such character as its number, such as \x1b; all else as it is."""
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if _steers(c) else c for c in text)


def visible(text: str) -> str:
    r"""Text for a screen: line ends and tabs stay, all else as in `plain`, and unseen marks are written out too.

    Raises TypeError for what is no text.
    """
    return _SUSPECT.sub(lambda match: _show(match[0]), text)


def plain_values(value: Any) -> Any:
    """The same for all texts in what JSON can hold, keys too."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [plain_values(v) for v in value]
    if isinstance(value, dict):
        return {plain_values(k): plain_values(v) for k, v in value.items()}
    return value


def _show(character: str) -> str:
    unseen = unicodedata.category(character) == "Cf" and character not in _JOINERS
    return repr(character)[1:-1] if unseen or _steers(character) else character


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _COMMANDS or character in _DIRECTIONS

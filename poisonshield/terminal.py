"""Where text leaves for a screen: control characters in it are shown and not obeyed.

Names of classes, keys, paths and prompts come from strangers. An escape sequence in one can wipe a screen, hide a line,
or turn the order of letters around.
"""

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import rich.console
from rich.segment import Segment

_KEPT = "\n\t\u200c\u200d"  # lines and columns of ours, and two joiners without which some scripts cannot be written
_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, marks of format and direction, half characters, line ends
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e\u00a1-\u00ac\u00ae-\u02ff]")

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def visible(text: str) -> str:
    r"""The text with every control character written out: `\x1b`, `\u202e`. Line ends and tabs stay.

    Raises TypeError for what is no text.
    """
    return _SUSPECT.sub(_write_out, text)


def _write_out(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in _KEPT or unicodedata.category(letter) not in _KINDS:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


class Formatter(logging.Formatter):
    """A log record as visible text."""

    def format(self, record: logging.LogRecord) -> str:
        """Its words."""
        return visible(super().format(record))


class Screen:
    """A stream that what is printed leaves by, as visible text.

    stream: where it goes. rich_proxied_file: where rich goes, which looks for it under this name; it draws by escape
    sequences, so those of colours pass there.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.rich_proxied_file = _Coloured(stream)

    def write(self, text: str) -> int:
        """Write it visibly; letters that the stream's encoding lacks are written out too."""
        encoding = self.stream.encoding or "utf-8"
        return self.stream.write(self.show(text).encode(encoding, "backslashreplace").decode(encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def show(self, text: str) -> str:
        """What is written of a text."""
        return visible(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Coloured(Screen):
    """The same for libraries that draw tables on it, such as typer's help: colours stay."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, text: str) -> str:
        """The text with its colours."""
        return "".join(part if i % 2 else visible(part) for i, part in enumerate(_COLOUR.split(text)))


class Console(rich.console.Console):
    """rich's console, for tables and bars that hold what strangers wrote: styles are ours, their text is visible."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        file = stream.stream if isinstance(stream, Screen) else None
        super().__init__(file=file, stderr=stderr, **options)

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of what is printed; those that steer the terminal are rich's own."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(visible(piece.text), piece.style)


@contextmanager
def guard() -> Iterator[None]:
    """What is printed inside is visible text. Use Console for tables and bars."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Screen(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams

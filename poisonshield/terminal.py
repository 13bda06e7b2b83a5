"""Where text leaves for a screen: control characters in it are shown and not obeyed.

Names of classes, keys, paths and prompts come from strangers. An escape sequence in one can wipe a screen, hide a line,
or turn the order of letters around.
"""

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import rich.console
from rich.segment import Segment

from poisonshield.plain import visible

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


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

"""`poisonshield bench`: parts of the package beside other libraries, in one run, checked before they are timed.

Each file here that defines `cases(device, quick)` is a benchmark of `bench ops`; a new op is a new file. The whole
paths are commands of their own: stream.py (`bench stream`), simclr.py, vespr.py and inversion.py (`bench invert`).
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from poisonshield.bench.record import plot
from poisonshield.bench.session import Session, show
from poisonshield.errors import ConfigError

_TOOLS = ("harness", "machine", "record", "session")
_WHOLE_PATHS = ("inversion", "pictures", "simclr", "stream", "textual_inversion", "vespr")


def benchmarks() -> list[str]:
    """The names of the ops that have a file here."""
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(n for n in names if n not in (*_TOOLS, *_WHOLE_PATHS))


def bench(session: Session, ops: Sequence[str] = (), figure: Path | None = None) -> None:
    """Time the ops, all if none is named; a table each, and a plot if one is asked for."""
    unknown = set(ops) - set(benchmarks())
    if unknown:
        raise ConfigError(f"no benchmark for {', '.join(sorted(unknown))}. Known: {', '.join(benchmarks())}")
    for name in ops or benchmarks():
        for case in importlib.import_module(f"{__name__}.{name}").cases(session.device, session.quick):
            show(case, session.time(case))
    if figure is not None:
        plot(figure, session.rows)

"""Every error a user can cause, each also the nearest builtin so that ordinary `except` clauses work."""

import re

_PLACE = re.compile(r"\[enforce fail at [^]]*\] ?|\s*\(?(?:at |in )?\S+\.(?:cpp|cc|cu|h|rs):\d+\)?")
_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation", "(1) ", "(2) ")


class PoisonShieldError(Exception):
    """Parent of all errors raised on purpose: what came, what was wanted, where, and what to do next."""


class ConfigError(PoisonShieldError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or does not fit another one."""


class RenamedSettings(ConfigError):
    """Nothing is wrong with a config but that settings have new names. moves: (old path, new name with dots)."""

    def __init__(self, message: str, moves: "list[tuple[tuple, str]]") -> None:
        super().__init__(message)
        self.moves = moves


class DataError(PoisonShieldError, ValueError):
    """A shard, sample, manifest or label is missing, damaged or outside what was declared."""


class ShapeError(PoisonShieldError, ValueError):
    """A tensor has another shape, dtype or range than the function takes."""


class BudgetError(PoisonShieldError, ValueError):
    """A perturbation exceeds its declared budget, or the budget itself makes no sense."""


class GradientError(PoisonShieldError, RuntimeError):
    """A derivative was asked for where there is none."""


class StorageError(PoisonShieldError, OSError):
    """A disk is full, read-only, or forbids what was asked; the message gives the path and the free space."""


class BusyError(PoisonShieldError, RuntimeError):
    """Another process works in the same folder; the message gives its host and number."""


class CheckpointError(PoisonShieldError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class BackendError(PoisonShieldError, RuntimeError):
    """A requested backend (op or engine) cannot run here; the message says why and what can."""


def reason_of(err: BaseException) -> str:
    """What a library says went wrong, in a line of at most 200 letters: without its advice, C++ places and stack."""
    text = _PLACE.sub("", str(err).partition("Exception raised from ")[0])
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(_ADVICE)]
    return (lines[0] if lines else type(err).__name__)[:200]

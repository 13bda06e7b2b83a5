"""Chooses a backend for each call of an op: argument > `use_backend` > POISONSHIELD_BACKEND > automatic.

Each op has a room, a folder with up to four files of functions that have the same names and take the same record of
arguments: `reference.py` (plain PyTorch, the oracle), `triton_kernels.py`, `cuda_binding.py` and `cpu_kernels.py`. A
kernel file also has `refusal(function, arguments)`, which gives the reason why it cannot take a call, or None.
Automatic takes the first of cuda, triton, cpu and reference that can; a backend asked for by name either runs or raises
with its reason. `compiled` is the reference under torch.compile: never chosen automatically, since its first call with
a new kind of input compiles for seconds. Rooms are found by scanning the folder.
"""

import importlib
import importlib.util
import os
import pkgutil
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from poisonshield.errors import BackendError
from poisonshield.ops import extension, native

BACKENDS = ("cuda", "triton", "cpu", "compiled", "reference")
AUTOMATIC = ("cuda", "triton", "cpu", "reference")
_FILES = {
    "cuda": "cuda_binding",
    "triton": "triton_kernels",
    "cpu": "cpu_kernels",
    "compiled": "reference",
    "reference": "reference",
}

_forced = "auto"
_runs: Counter[str] = Counter()
_refusals: Counter[str] = Counter()
_fallen: set[str] = set()


def requested(backend: str) -> str:
    """What a call asks for: its argument, or the surrounding `use_backend`. Raises BackendError for an unknown name."""
    if backend == "auto":
        return _forced
    return _known(backend)


def _known(backend: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise BackendError(f"{backend!r} is not an op backend. Known: auto, {', '.join(BACKENDS)}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Every op call inside uses `backend`, unless the call names another one. Of the process, not of a thread."""
    global _forced
    before, _forced = _forced, _known(backend)
    try:
        yield
    finally:
        _forced = before


def stats(reset: bool = False) -> dict[str, dict[str, int]]:
    """How often each function ran on each backend, and why backends were passed over: {'runs': .., 'refusals': ..}."""
    counts = {"runs": dict(_runs), "refusals": dict(_refusals)}
    if reset:
        _runs.clear()
        _refusals.clear()
    return counts


def info() -> dict[str, str]:
    """For each backend: 'ready', or why it cannot run here; and what is forced, if anything is."""
    forced = _forced if _forced != "auto" else os.environ.get("POISONSHIELD_BACKEND", "auto")
    facts = {b: _missing(b) or _everywhere(b) or "ready" for b in BACKENDS}
    return facts | {"in use": "the first that is ready and fits the call" if forced == "auto" else f"{forced} (forced)"}


def rooms() -> list[str]:
    """The names of all rooms: folders beside this file."""
    return [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg]


class Room:
    """The backends of the op in folder `poisonshield/ops/<name>`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, function: str, backend: str, arguments: Any) -> Any:
        """Call `function` on the requested backend. The device of the record's first tensor decides what can run."""
        if backend == "auto":
            backend = _known(os.environ.get("POISONSHIELD_BACKEND", "auto"))
        for candidate in AUTOMATIC if backend == "auto" else (backend,):
            reason = self.refusal(candidate, function, arguments)
            if reason is None:
                _runs[f"{function} on {candidate}"] += 1
                if candidate == "compiled":
                    return self._run_compiled(function, arguments)
                return self._run(candidate, function, arguments)
            if backend != "auto":
                raise BackendError(
                    f"{function}: the {candidate} backend cannot run this call: {reason}. "
                    "backend='auto' takes the best one that can; poisonshield.ops.info() lists what is here."
                )
            if arguments[0].is_cuda:
                _refusals[f"{function} on {candidate}: {reason}"] += 1
        raise AssertionError("the reference takes every call")

    def refusal(self, backend: str, function: str, arguments: Any) -> str | None:
        """Why `backend` cannot take this call, or None."""
        reason = self.missing(backend, arguments[0].device)
        if reason is not None or backend in ("reference", "compiled"):
            return reason
        return self._module(backend).refusal(function, arguments)

    def missing(self, backend: str, device: torch.device) -> str | None:
        """Why `backend` can take no call at all on this kind of device, or None."""
        if backend in ("reference", "compiled"):
            return None
        reason = _missing(backend)
        if reason is None and device.type != _device_of(backend):
            reason = f"the tensor is on {device.type}"
        if reason is None and not _exists(self._path(backend)):
            reason = f"{self.name} has no {backend} kernels"
        return reason

    def _path(self, backend: str) -> str:
        return f"poisonshield.ops.{self.name}.{_FILES[backend]}"

    def _module(self, backend: str) -> Any:
        return _load(self._path(backend))

    def _run(self, backend: str, function: str, arguments: Any) -> Any:
        call = getattr(self._module(backend), function)
        if backend == "triton" and arguments[0].is_cuda:
            with torch.cuda.device(arguments[0].device):  # Triton launches on the current device, not on the tensor's
                return call(arguments)
        return call(arguments)

    def _run_compiled(self, function: str, arguments: Any) -> Any:
        """The reference under torch.compile; the plain one, with one notice, where compilation is impossible."""
        plain = getattr(self._module("reference"), function)
        if function in _fallen:
            return plain(arguments)
        reason = _everywhere("compiled")
        if reason is None:
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            try:
                return _compile(plain)(arguments)
            except (TorchDynamoException, FailOnRecompileLimitHit) as err:
                reason = f"torch.compile failed: {str(err).splitlines()[0]}"
        _fallen.add(function)
        warnings.warn(f"{function}: the plain reference runs instead of the compiled one: {reason}", stacklevel=2)
        return plain(arguments)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing(backend: str) -> str | None:
    """Why a backend's software is not here, or None."""
    if backend == "cuda":
        return extension.missing()
    if backend == "triton" and not _exists("triton"):
        return "triton is not installed"
    if backend == "cpu":
        return native.missing()
    return None


def _device_of(backend: str) -> str:
    """The type of device whose tensors a kernel backend takes."""
    return "cpu" if backend == "cpu" or (backend == "triton" and interpreting()) else "cuda"


def _everywhere(backend: str) -> str | None:
    """Why a backend, although its software is here, runs no call at all on this machine; or None."""
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "triton" and not torch.cuda.is_available() and not interpreting():
        return "no CUDA device (TRITON_INTERPRET=1, set before the start, checks kernels on the CPU)"
    if backend == "compiled" and not torch.cuda.is_available() and _compiler() is None:
        return "no C++ compiler: install g++ or clang++, or set CXX"
    return None


@cache
def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _load(module: str) -> Any:
    return importlib.import_module(module)


@cache
def _compiler() -> str | None:
    return next((p for c in (os.environ.get("CXX"), "g++", "clang++") if c and (p := shutil.which(c))), None)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Symbolic sizes make padding's guards grow until compilation takes minutes; each shape is compiled by itself.
    return torch.compile(function, fullgraph=True, dynamic=False)

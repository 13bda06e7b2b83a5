"""The compiled CPU library, if it was built: csrc/cpu -> `poisonshield/_cpu.abi3.so`, called through ctypes.

It knows nothing of torch: functions take a record of pointers, sizes and strides. Loaded at the first question.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import poisonshield
from poisonshield.errors import BackendError

_SHORT_OF_MEMORY, _OTHER_VERSION = 1, 2


@cache
def missing() -> str | None:
    """Why the library is not here, or None once it is loaded."""
    try:
        _library()
    except (FileNotFoundError, OSError) as err:
        return str(err)
    return None


@cache
def _library() -> ctypes.CDLL:
    folder = Path(poisonshield.__file__).parent
    found = sorted(folder.glob("_cpu*.so"))
    if not found:
        reason = folder / "_no_cpu.txt"  # written by setup.py
        told = f" ({reason.read_text().strip()})" if reason.is_file() else ""
        raise FileNotFoundError(f"the CPU library is not built{told}")
    try:
        return ctypes.CDLL(str(found[0]))
    except OSError as err:
        raise OSError(f"{found[0].name} does not load: {err}") from err


def call(function: str, record: ctypes.Structure) -> None:
    """Run a function of the library on its record, whose first field is its size. Raises BackendError, MemoryError."""
    status = getattr(_library(), f"poisonshield_{function}")(ctypes.byref(record))
    if status == _SHORT_OF_MEMORY:
        raise MemoryError(f"{function} on the cpu backend: no memory for its rows. Give smaller images.")
    if status == _OTHER_VERSION:
        raise BackendError(f"{function}: the CPU library is of another version of poisonshield. Install it again.")


def threads() -> int:
    """How many a call may use: torch's own number."""
    return torch.get_num_threads()


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are; None for none."""
    return None if tensor is None else tensor.data_ptr()

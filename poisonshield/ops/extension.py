"""The compiled CUDA module, if it was built: csrc -> `poisonshield/_C.abi3.so`, operators under `poisonshield_cuda`.

It is loaded at the first question, never by importing the package, and only where torch has CUDA.
"""

from functools import cache
from pathlib import Path

import torch

import poisonshield


@cache
def missing() -> str | None:
    """Why the compiled operators are not here, or None once they are loaded."""
    folder = Path(poisonshield.__file__).parent
    found = sorted(folder.glob("_C*.so"))
    if not found:
        reason = folder / "_no_cuda.txt"  # written by setup.py
        return "the extension is not built" + (f" ({reason.read_text().strip()})" if reason.is_file() else "")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as err:
        return f"{found[0].name} does not load: {err}"
    return None

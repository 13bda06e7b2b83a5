"""Which precision a loss is computed in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is a half precision, else as it is: losses need float32, and float64 must stay exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, taking tensors or a tuple of them first, with autocast off: products keep the inputs' precision."""

    @wraps(function)
    def run(first: Tensor | tuple[Tensor, ...], *args: Any, **settings: Any) -> Any:
        tensors = [first] if isinstance(first, Tensor) else [v for v in first or () if isinstance(v, Tensor)]
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            return function(first, *args, **settings)

    return run

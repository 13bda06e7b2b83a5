"""Small constant tensors are kept for each device: one made there from numbers of Python waits for the device."""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

Make = Callable[[torch.dtype, torch.device], Tensor]


def kept(make: Make) -> Make:
    """`make`, called once for each dtype and device. What it gives must not be changed.

    The first call for a CUDA device waits for it, and cannot be captured in a CUDA graph; later ones do neither.
    """

    @cache
    def made(dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # autograd may keep it
            return make(dtype, device)

    @wraps(make)
    def get(dtype: torch.dtype, device: torch.device) -> Tensor:
        # A mode that fakes tensors takes no real one, and what is made under it must not outlive it.
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return make(dtype, device)
        return made(dtype, device)

    return get

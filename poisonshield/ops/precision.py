"""Which precision a loss is computed in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where it is a half precision, else as it is: losses need float32, and float64 must stay exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Distinct sign patterns, one per class: the vertices of `lsp` and the colours of `regions`."""

import torch
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.ops.philox import philox_uniform, stream_of


def distinct_signs(count: int, length: int, *, seed: int, purpose: str) -> Tensor:
    """`count` different vertices of {-1, +1}^length, float32 [count, length]: the first different ones drawn by seed.

    Raises ConfigError when there are not that many.
    """
    if length < 31 and count > 2**length:
        raise ConfigError(
            f"{purpose}: {count} classes need different patterns, but {length} signs give only {2**length}.\n"
            f"  Use more cells (a smaller patch, more regions)."
        )
    found: dict[tuple[bool, ...], None] = {}
    start = 0
    while len(found) < count:
        ids = torch.arange(start, start + count)
        draws = philox_uniform((len(ids), length), seed, sample_ids=ids, stream=stream_of(purpose)) < 0.5
        found.update(dict.fromkeys(map(tuple, draws.tolist())))
        start += count
    return torch.tensor(list(found)[:count]).to(torch.float32) * 2 - 1

"""The random numbers of a step, drawn in one kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poisonshield.ops import keyed_uniform
from poisonshield.random import KeyedRandom, box_muller


def draw_together(rng: KeyedRandom, uniform: Sequence[str], normal: Sequence[str], count: int) -> dict[str, Tensor]:
    """What rng.uniform(purpose, 1) [B, 1] and rng.normal(purpose, count) [B, count] are for each purpose, in one pass.

    Drawn one by one, a small step spends more time on them than on its loss.
    """
    purposes, rows = (*uniform, *normal), len(rng.ids)
    # Filled, not copied from a list: a GPU would wait for that.
    streams = [torch.full((rows,), rng.stream(purpose), device=rng.ids.device) for purpose in purposes]
    ids, width = rng.ids.repeat(len(purposes)), 2 * ((count + 1) // 2)
    u = keyed_uniform(ids, width, seed=rng.seed, offset=rng.offset, stream=torch.cat(streams))
    split = rows * len(uniform)
    drawn = (*u[:split, :1].chunk(len(uniform)), *box_muller(u[split:], count).chunk(len(normal)))
    return dict(zip(purposes, drawn, strict=True))

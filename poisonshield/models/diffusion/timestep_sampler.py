"""Drawing timesteps from a range, from numbers that belong to the samples alone."""

import torch
from torch import Tensor

from poisonshield.errors import ConfigError


def draw_timesteps(
    u: Tensor,
    *,
    t_range: tuple[int, int],
    sampler: str = "uniform",
    stratum: Tensor | None = None,
    strata: Tensor | int = 1,
    width: float = 50.0,
) -> Tensor:
    """Timesteps int64 [B] from u float32 [B] in [0, 1).

    "uniform": from [first, end). "stratified": sample b's from part stratum[b] of `strata` equal parts of it. "soft":
    from all of [0, end), by the density sigmoid((t - first) / width): a floor without an edge.
    Raises ConfigError for "stratified" without a stratum.
    """
    first, end = t_range
    if sampler == "soft":
        density = torch.sigmoid((torch.arange(end, dtype=torch.float64) - first) / width)
        edges = (density.cumsum(0) / density.sum()).to(u.device)
        return torch.searchsorted(edges, u.double(), right=True).clamp_(max=end - 1)
    if sampler == "stratified":
        if stratum is None:
            raise ConfigError("stratified timesteps need `stratum`: which of the equal parts each sample draws from.")
        u = (stratum + u.double()) / strata
    # float64: in float32 a product near a whole number rounds up to the next timestep.
    return (first + (u.double() * (end - first)).long()).clamp_(max=end - 1)

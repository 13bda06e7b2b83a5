"""Negative cosine of predictions and targets: BYOL's and SimSiam's loss. Sources: Grill et al. 2020; Chen and He 2021.

    L = - 1 / pairs sum_{i, j != i} mean_n cos(p_i[n], m_j[n])
No sample meets another one, so nothing is gathered. (BYOL writes 2 - 2 cos: the same gradient but for a factor of 2.)
"""

import torch.nn.functional as F
from torch import Tensor

from poisonshield import collectives
from poisonshield.losses.pairs import Views, pairs
from poisonshield.ops.precision import at_least_float32, outside_autocast


@outside_autocast
def negative_cosine(
    online: Views, target: Views, *, symmetrized: bool = True, rank_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """A scalar in [-1, 1]; online and target one [B, D] per view. Gradient goes wherever the inputs ask for it."""
    view_pairs = pairs(online, target, symmetrized=symmetrized)
    p = [F.normalize(at_least_float32(x), dim=1) for x in online]
    m = [F.normalize(at_least_float32(x), dim=1) for x in target]
    cosines = sum(((p[i] * m[j]).sum(1) for i, j in view_pairs), start=p[0].new_zeros(()))  # [B]
    return -collectives.mean(cosines, rank_sizes) / len(view_pairs)

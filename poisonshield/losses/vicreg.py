"""VICReg: variance above one, views alike, columns uncorrelated. Source: Bardes, Ponce and LeCun 2022.

    L = variance * v + invariance * MSE(p_i, m_j) + covariance * c, averaged over pairs of views (i, j), with
    v = 1/2 sum over {p_i, m_j} of mean_d max(0, 1 - std_d),   c = sum over {p_i, m_j} of sum_{d != e} cov_de^2 / D

Each rank needs the statistics of the global batch: views are gathered with gradient.
"""

import torch
from torch import Tensor

from poisonshield.losses.pairs import Views, check_samples, gather_views, pairs
from poisonshield.ops.check import check_number
from poisonshield.ops.precision import outside_autocast


@outside_autocast
def vicreg(
    online: Views,
    target: Views | None = None,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    legacy: bool = False,
    symmetrized: bool = True,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar; online and target one [B, D] per view, target defaults to online. Needs two samples or more.

    legacy: as in the VESPR authors' code. The two variance terms are added, not averaged, the floor is max(var, 1e-6)
    in place of var + 1e-4, and for more than two views p_i's own terms count once, not once for each partner.
    """
    for name, value in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_number(name, value, least=0)
    target = online if target is None else target
    view_pairs = pairs(online, target, symmetrized=symmetrized)
    p = gather_views(online, rank_sizes)
    check_samples(p, 2, "vicreg")
    m = p if target is online else gather_views(target, rank_sizes)

    def spread(z: Tensor) -> Tensor:
        """The variance and covariance terms of one view, a scalar."""
        centred = z - z.mean(0)
        cov = centred.T @ centred / (len(z) - 1)  # [D, D]
        var = cov.diagonal()
        # The root has an endless slope at 0, hence the floor.
        std = (var.clamp(min=1e-6) if legacy else var + 1e-4).sqrt()
        # The squares beside the diagonal.
        off = (cov.square().sum() - var.square().sum()) / z.shape[1]
        return variance * (1 if legacy else 0.5) * (1 - std).clamp(min=0).mean() + covariance * off

    own = [spread(z) for z in p]
    other = own if m is p else [spread(z) for z in m]
    total = torch.stack([invariance * (p[i] - m[j]).square().mean() + other[j] for i, j in view_pairs]).sum()
    asking_views = [i for i, _ in view_pairs]
    counted = dict.fromkeys(asking_views) if legacy else asking_views
    return (total + sum((own[i] for i in counted), start=total.new_zeros(()))) / len(view_pairs)

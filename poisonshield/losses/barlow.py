"""Barlow Twins: the cross-correlation of two views is the identity. Zbontar et al. 2021; HSIC: Tsai et al. 2021.

    X = z_i^T z_j / B over standardized columns;   L = sum_d (X_dd - 1)^2 + off_diagonal sum_{d != e} X_de^2
averaged over pairs of views. With hsic the off-diagonal aims at -1: (X_de + 1)^2.

Each rank needs the correlation of the global batch: z is gathered with gradient, once for all views.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.losses.pairs import Views, check_samples, gather_views, pairs
from poisonshield.ops.check import check_choice, check_number
from poisonshield.ops.precision import outside_autocast


@outside_autocast
def barlow(
    online: Views,
    target: Views | None = None,
    *,
    off_diagonal: float = 0.005,
    scaling: Literal["columns", "rows"] = "columns",
    hsic: bool = False,
    legacy: bool = False,
    symmetrized: bool = True,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar; online and target one [B, D] per view, target defaults to online.

    scaling: standardize columns over the batch (biased deviation, epsilon 1e-5 as a batch norm has), or l2-normalize
    rows. legacy: as in the VESPR authors' code. The upper triangle counts twice and the lower one not at all, although
    X is not symmetric; deviations are unbiased, without epsilon; hsic adds 1 to the zeroed triangle too, a constant.
    """
    check_number("off_diagonal", off_diagonal, least=0)
    check_choice("scaling", scaling, ("columns", "rows"))
    target = online if target is None else target
    view_pairs = pairs(online, target, symmetrized=symmetrized)
    gathered = gather_views(online, rank_sizes)
    check_samples(gathered, 2 if legacy and scaling == "columns" else 1, "barlow")
    p = [_scale(x, scaling, legacy) for x in gathered]
    m = p if target is online else [_scale(x, scaling, legacy) for x in gather_views(target, rank_sizes)]
    aim = -1.0 if hsic else 0.0
    total = p[0].new_zeros(())
    for i, j in view_pairs:
        cross = p[i].T @ m[j] / len(p[i])  # [D, D]
        if legacy:  # their loss counts one triangle twice, as if X were symmetric
            off = 2 * (cross.triu(1) - aim).square().sum()
        else:
            away = (cross - aim).square()
            off = away.sum() - away.diagonal().sum()
        total = total + (cross.diagonal() - 1).square().sum() + off_diagonal * off
    return total / len(view_pairs)


def _scale(z: Tensor, scaling: str, legacy: bool) -> Tensor:
    """z [B, D] with rows of length 1, or with columns of mean 0 and deviation 1."""
    if scaling == "rows":
        return F.normalize(z, dim=1)
    centred = z - z.mean(0)
    if legacy:
        return centred / z.std(0)
    return centred * torch.rsqrt(centred.square().mean(0) + 1e-5)

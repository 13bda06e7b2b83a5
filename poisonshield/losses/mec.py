"""Maximum entropy coding: the coding rate of two views' agreement, as a Taylor series. Source: Liu et al. 2022.

    A = z_i z_j^T / (B distortion),   L = -w tr sum_{k=1..terms} (-1)^(k+1) A^k / k,   averaged over pairs
over l2-normalized rows; `distortion` is the paper's epsilon^2 D. The coding length has w = (B + D)/2, which makes a
loss some thousand times a cosine that grows with batch and width; its gradient would drown any other term at any usual
rate, so the default is w = distortion, with which the first term is minus the mean cosine. tr(A^k) is taken in the
smaller of [B, B] and [D, D] (equal by cyclicity), and the last power needs no product: tr(A^2) = sum A * A^T.

Each rank needs the products of the global batch: views are gathered with gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.losses.pairs import Views, gather_views, pairs
from poisonshield.ops.check import check_number
from poisonshield.ops.precision import outside_autocast


@outside_autocast
def mec(
    online: Views,
    target: Views | None = None,
    *,
    distortion: float = 0.06,
    terms: int = 4,
    coding_length: bool = False,
    symmetrized: bool = True,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar; online and target one [B, D] per view, target defaults to online. terms 2 and
    coding_length are the VESPR authors' form."""
    check_number("distortion", distortion, above=0)
    check_number("terms", terms, least=1, whole=True)
    target = online if target is None else target
    view_pairs = pairs(online, target, symmetrized=symmetrized)
    p = [F.normalize(x, dim=1) for x in gather_views(online, rank_sizes)]
    m = p if target is online else [F.normalize(x, dim=1) for x in gather_views(target, rank_sizes)]
    size, width = p[0].shape
    total = torch.stack([_log_det_series(p[i], m[j], size * distortion, terms) for i, j in view_pairs]).sum()
    return -(0.5 * (size + width) if coding_length else distortion) * total / len(view_pairs)


def _log_det_series(a: Tensor, b: Tensor, scale: float, terms: int) -> Tensor:
    """The first terms of tr log(I + a b^T / scale)."""
    step = (a @ b.T if len(a) <= a.shape[1] else b.T @ a) / scale
    power, out = None, (a * b).sum() / scale
    for k in range(2, terms + 1):
        power = step if power is None else power @ step  # A^(k - 1)
        # tr(A^(k - 1) A), without forming the product.
        out = out + (-1) ** (k + 1) / k * (power * step.T).sum()
    return out

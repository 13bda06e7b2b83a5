"""InfoNCE over views (NT-Xent when queries are keys). Source: Chen et al. 2020, "A simple framework ...".

For each ordered pair of views (i, j) and each sample n, the query is p_i[n], the positive key m_j[n], and the negatives
are the other samples' keys of view j and of view i (the sample's own key of view i is left out):
    L = 1 / (V (V - 1)) sum_{i, j != i} mean_n [ -s(p_i[n], m_j[n]) + log( sum_k exp s(p_i[n], m_j[k]) + sum_{k != n} exp s(p_i[n], m_i[k]) ) ]
with s = cosine / temperature. Keys are gathered over ranks, queries stay local, so memory is [B, global B] per pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import ShapeError
from poisonshield.ops.precision import at_least_float32


def ntxent(
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...] | None = None,
    *,
    temperature: float = 0.2,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar loss. queries and keys: one [B, D] per view, at least two; keys default to the queries.

    With ranks, the value is this rank's share such that the mean over ranks, and the mean of the gradients, are those of
    the global batch. Raises ShapeError for fewer than two views or unequal shapes.
    """
    keys = queries if keys is None else keys
    if len(queries) < 2 or len(keys) != len(queries) or any(q.shape != queries[0].shape for q in (*queries, *keys)):
        shapes = [tuple(t.shape) for t in (*queries, *keys)]
        raise ShapeError(f"ntxent got views of shapes {shapes}; it needs two or more views, all [B, D] alike.")
    # Similarities in float32: in half precision their resolution would be near 1e-3 / temperature.
    p = [F.normalize(at_least_float32(q), dim=1) / temperature for q in queries]
    m = [collectives.gather(F.normalize(at_least_float32(k), dim=1), rank_sizes) for k in keys]
    size, first = len(queries[0]), sum((rank_sizes or ())[: collectives.rank()])
    own = torch.arange(first, first + size, device=p[0].device)
    total = p[0].new_zeros(size)
    for i, query in enumerate(p):
        same = query @ m[i].T  # [B, global B]
        same = same.scatter(1, own[:, None], float("-inf"))
        for j, key in enumerate(m):
            if j != i:
                cross = query @ key.T  # [B, global B]
                total = total + torch.cat([cross, same], dim=1).logsumexp(1) - cross.gather(1, own[:, None])[:, 0]
    return collectives.mean(total, rank_sizes) / (len(p) * (len(p) - 1))

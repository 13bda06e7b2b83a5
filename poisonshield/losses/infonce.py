"""Weighted InfoNCE over views: NT-Xent (SimCLR) and MoCo v3's loss. Sources: Chen et al. 2020; Chen, Xie and He 2021.

For each ordered pair of views (i, j) and each sample n, the query is p_i[n], the positive key m_j[n], and the negatives
are the other samples' keys of view j and, depending on `same_view`, keys of view i:
    L = 1 / pairs sum_{i, j != i} mean_n [ -s(p_i[n], m_j[n]) + w log( sum_k exp s(p_i[n], m_j[k]) + S_i[n] ) ]
    S_i[n] = 0 ("none", MoCo) | sum_{k != n} exp s(p_i[n], m_i[k]) ("others", SimCLR) | sum_k exp s(p_i[n], m_i[k]) ("all")
with s = cosine / temperature and w = negative_weight. Views beyond two are not pooled: each pair has its own denominator.

Over ranks nothing is sent in the backward pass. Each rank has its block of rows, [b, global B], with gradient for its
queries. What other ranks' rows ask of this rank's keys is the block of columns, [global B, b], whose weights are known
once every rank has the rows' log-denominators: one [B] vector a pair, where gathering with gradient would send [B, D].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import ShapeError
from poisonshield.losses.pairs import Views, pairs
from poisonshield.ops.precision import at_least_float32, outside_autocast

SameView = Literal["none", "others", "all"]


@outside_autocast
def infonce(
    queries: Views,
    keys: Views | None = None,
    *,
    temperature: float = 0.2,
    same_view: SameView = "others",
    negative_weight: float = 1.0,
    margin: float = 0.0,
    symmetrized: bool = True,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar loss. queries and keys: one [B, D] per view, at least two; keys default to the queries.

    margin > 0 averages the loss with a copy whose positive cosines are lower, and negative ones higher, by the margin
    (implicit feature modification, Robinson et al. 2021). With same_view "all" the positives include a view's own keys, as
    in the VESPR authors' code. With ranks, the value is this rank's share such that the mean over ranks, and the mean
    of the gradients, are those of the global batch. Raises ShapeError for unfit views.
    """
    keys = queries if keys is None else keys
    asked = pairs(queries, keys, symmetrized=symmetrized)
    if same_view != "none" and len(keys) != len(queries):
        raise ShapeError(
            f"same_view {same_view!r} compares each query with keys of its own view, and there are {len(queries)} views of "
            f"queries and {len(keys)} of keys. Use same_view 'none'."
        )
    # Similarities in float32: in half precision their resolution would be near 1e-3 / temperature.
    p = [F.normalize(at_least_float32(q), dim=1) for q in queries]
    m = p if keys is queries else [F.normalize(at_least_float32(k), dim=1) for k in keys]
    margins = (0.0,) if margin == 0 else (0.0, margin)
    rows = _Rows(p, m, temperature, same_view, rank_sizes)
    total = sum(rows.positive(i, j, by) + negative_weight * rows.negative(i, j, by) for by in margins for i, j in asked)
    if same_view == "all":
        total = total + sum(rows.positive(i, i, 0.0) for i in dict.fromkeys(i for i, _ in asked)) * len(margins)
    return collectives.mean(total, rank_sizes) / (len(asked) * len(margins))


class _Rows:
    """This rank's rows of the similarity matrices, and what other ranks' rows ask of this rank's keys."""

    def __init__(
        self,
        p: list[Tensor],
        m: list[Tensor],
        temperature: float,
        same_view: SameView,
        rank_sizes: tuple[int, ...] | None,
    ) -> None:
        self.p, self.m, self.temperature, self.same_view, self.sizes = p, m, temperature, same_view, rank_sizes
        size, first = len(p[0]), sum((rank_sizes or ())[: collectives.rank()])
        if rank_sizes is None:
            first = collectives.rank() * size
        self.own = torch.arange(first, first + size, device=p[0].device)
        self.alone = collectives.world_size() == 1
        self.answers = torch.is_grad_enabled() and any(k.requires_grad for k in m)
        if self.alone:
            self.all_keys = m
            return
        with torch.no_grad():
            everyone = [self._gather(k) for k in m]
            shared = self._gather if m is not p else None
            self.all_queries = (everyone if shared is None else [shared(q) for q in p]) if self.answers else []
        self.all_keys = [k.index_copy(0, self.own, mine) for k, mine in zip(everyone, m)]

    def _gather(self, x: Tensor) -> Tensor:
        return collectives.gather(x.detach(), self.sizes)

    def positive(self, i: int, j: int, margin: float) -> Tensor:
        """Minus the similarity of each sample to its own key, [b]."""
        return -((self.p[i] * self.m[j]).sum(1) - margin) / self.temperature

    def negative(self, i: int, j: int, margin: float) -> Tensor:
        """The log-denominator of each sample, [b]; its gradient includes the block of columns."""
        logits = self._logits(self.p[i], self._asked(self.all_keys, i, j), self.own, margin)
        out = logits.logsumexp(1)
        if self.alone or not self.answers:
            return out
        with torch.no_grad():
            every = self._gather(out)  # [B]
        others = torch.ones(len(every), dtype=torch.bool, device=out.device)
        others[self.own] = False
        columns = self._logits(self.all_queries[i][others], self._asked(self.m, i, j), None, margin)  # [B - b, 2 b]
        weight = (columns.detach() - every[others, None]).exp()
        asked = (weight * columns).sum()
        # The value stays the rows' own; the gradient of what other ranks' rows hold of our keys comes along.
        return out + (asked - asked.detach()) / len(out)

    def _asked(self, keys: list[Tensor], i: int, j: int) -> list[Tensor]:
        """The keys that queries of view i meet beside their positives in view j."""
        return [keys[j]] if self.same_view == "none" else [keys[j], keys[i]]

    def _logits(self, query: Tensor, key: list[Tensor], own: Tensor | None, margin: float) -> Tensor:
        """[rows, keys of view j, then of view i] over the temperature; own: which key belongs to each row's sample."""
        parts = [query @ k.T + margin for k in key]
        if own is not None:
            at = own[:, None]
            nearer = query.new_full(at.shape, -2 * margin)
            parts[0] = parts[0].scatter_add(1, at, nearer)
            if self.same_view == "all":
                parts[1] = parts[1].scatter_add(1, at, nearer)
            elif self.same_view == "others":
                parts[1] = parts[1].scatter(1, at, float("-inf"))
        return torch.cat(parts, dim=1) / self.temperature

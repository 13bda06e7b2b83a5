"""Weighted InfoNCE over views: NT-Xent (SimCLR) and MoCo v3's loss. Sources: Chen et al. 2020; Chen, Xie and He 2021.

For each ordered pair of views (i, j) and each sample n, the query is p_i[n], the positive key m_j[n], and the
negatives are the other samples' keys of view j and, depending on `same_view`, keys of view i:
    L = 1 / pairs sum_{i, j != i} mean_n [ -s(p_i[n], m_j[n]) + w log( sum_k exp s(p_i[n], m_j[k]) + S_i[n] ) ]
    S_i[n] = 0 ("none", MoCo), sum_{k != n} exp s(p_i[n], m_i[k]) ("others", SimCLR), or that sum over all k ("all")
with s = cosine / temperature and w = negative_weight. Views beyond two are not pooled: each pair has a denominator of
its own.

Over ranks each one computes the part of the table of similarities that holds something of its own. For rank 0 of two,
with samples a and b of the global batch a b c d e:

                     keys of  rank 0   rank 1
                              a   b    c   d   e
    queries of rank 0     a | R   R    R   R   R |   R: the block of rows, [b, B]. Its queries against all keys, which
                          b | R   R    R   R   R |      gives its samples' denominators and its queries' gradient.
               rank 1     c | C   C                  C: the block of columns, [B - b, b]. Others' queries against its
                          d | C   C                     keys, which gives the rest of its keys' gradient.
                          e | C   C

Row c's softmax weights in C need row c's denominator, which rank 1 knows and sends: a [B] vector for each pair of
views. Nothing is sent in the backward pass, where a gather with gradient would send [B, D].
"""

from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield import collectives
from poisonshield.config import Settings
from poisonshield.errors import ShapeError
from poisonshield.losses.pairs import Views, pairs
from poisonshield.ops.check import check_choice, check_number
from poisonshield.ops.precision import at_least_float32, outside_autocast

SAME_VIEWS = Literal["none", "others", "all"]

SameView = Annotated[
    SAME_VIEWS,
    Field(
        description="Keys of a query's own view in its denominator: none (MoCo v3), others (all but its own sample's, "
        "SimCLR), or all (its own sample's too, which then count as positives)."
    ),
]


class InfoNCEConfig(Settings):
    """What `infonce` takes, for the methods that train with it."""

    temperature: float = Field(0.2, gt=0, description="What cosines are divided by before the softmax.")
    same_view: SameView = "others"
    negative_weight: float = Field(1.0, gt=0, description="Weight of the log-denominator beside the positive.")
    margin: float = Field(
        0.0,
        ge=0,
        description="Cosine by which positives are lowered and negatives raised in a second copy of the loss, which is "
        "averaged with the first; 0 is without a copy.",
    )
    symmetrized: bool = Field(True, description="Whether every view asks, and not the first alone.")


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
    (implicit feature modification, Robinson et al. 2021). With same_view "all" the positives include a view's own keys,
    as in the VESPR authors' code. With ranks, the value is this rank's share such that the mean over ranks, and the
    mean of the gradients, are those of the global batch. Raises ShapeError for unfit views, ConfigError for settings
    without a meaning.
    """
    check_number("temperature", temperature, above=0)
    check_number("negative_weight", negative_weight, least=0)
    check_number("margin", margin, least=0)
    check_choice("same_view", same_view, get_args(SAME_VIEWS))
    keys = queries if keys is None else keys
    view_pairs = pairs(queries, keys, symmetrized=symmetrized)
    if same_view != "none" and len(keys) != len(queries):
        raise ShapeError(
            f"same_view {same_view!r} compares each query with keys of its own view, and there are {len(queries)} "
            f"views of queries and {len(keys)} of keys. Use same_view 'none'."
        )
    # Similarities in float32: in half precision their resolution would be near 1e-3 / temperature.
    p = [F.normalize(at_least_float32(q), dim=1) for q in queries]
    m = p if keys is queries else [F.normalize(at_least_float32(k), dim=1) for k in keys]
    margins = (0.0,) if margin == 0 else (0.0, margin)
    table = _Similarities(p, m, temperature=temperature, same_view=same_view, rank_sizes=rank_sizes)
    total = p[0].new_zeros(())
    for by in margins:
        for i, j in view_pairs:
            total = total + (table.negated_positive(i, j, by) + negative_weight * table.log_denominator(i, j, by))
    if same_view == "all":
        asking_views = dict.fromkeys(i for i, _ in view_pairs)
        own = sum((table.negated_positive(i, i, 0.0) for i in asking_views), start=p[0].new_zeros(()))
        total = total + own * len(margins)
    return collectives.mean(total, rank_sizes) / (len(view_pairs) * len(margins))


class _Similarities:
    """This rank's part of the table of similarities: its block of rows, and the block of columns of its keys.

    queries, keys: l2-normalized, one [b, D] per view. own: the places [b] of this rank's samples in the global batch.
    """

    def __init__(
        self,
        queries: list[Tensor],
        keys: list[Tensor],
        *,
        temperature: float,
        same_view: SameView,
        rank_sizes: tuple[int, ...] | None,
    ) -> None:
        self.queries, self.keys, self.temperature, self.same_view = queries, keys, temperature, same_view
        self.rank_sizes = rank_sizes
        self.own = _own_places(len(queries[0]), rank_sizes, queries[0].device)
        self.alone = collectives.world_size() == 1
        self.keys_learn = torch.is_grad_enabled() and any(k.requires_grad for k in keys)
        self.all_keys, self.all_queries = keys, queries
        if not self.alone:
            self._gather_blocks()

    def negated_positive(self, i: int, j: int, margin: float) -> Tensor:
        """Minus the similarity of each sample to its own key, [b]."""
        return -((self.queries[i] * self.keys[j]).sum(1) - margin) / self.temperature

    def log_denominator(self, i: int, j: int, margin: float) -> Tensor:
        """The logarithm of each sample's denominator, [b]; its gradient includes that of the block of columns."""
        rows = self._logits(self.queries[i], self._choose_keys(self.all_keys, i, j), self.own, margin)  # [b, B or 2 B]
        own = rows.logsumexp(1)
        if self.alone or not self.keys_learn:
            return own
        columns = self._columns(own, i, j, margin)
        # Adds 0 to the value, which is that of the rows alone, and the columns' gradient to that of the keys.
        return own + (columns - columns.detach()) / len(own)

    def _columns(self, own: Tensor, i: int, j: int, margin: float) -> Tensor:
        """A scalar with the gradient of other ranks' log-denominators for this rank's keys; own [b], this rank's.

        The gradient of a log-denominator for a logit is its softmax weight, exp(logit - log-denominator).
        """
        with torch.no_grad():
            everyones = self._gather(own)  # [B]
        others = torch.ones(len(everyones), dtype=torch.bool, device=own.device)
        others[self.own] = False
        logits = self._logits(self.all_queries[i][others], self._choose_keys(self.keys, i, j), None, margin)
        weight = (logits.detach() - everyones[others, None]).exp()  # [B - b, b or 2 b]
        return (weight * logits).sum()

    def _choose_keys(self, keys: list[Tensor], i: int, j: int) -> list[Tensor]:
        """The keys that stand in the denominator of view i's queries whose positives are in view j."""
        return [keys[j]] if self.same_view == "none" else [keys[j], keys[i]]

    def _logits(self, query: Tensor, keys: list[Tensor], own: Tensor | None, margin: float) -> Tensor:
        """[rows, keys of view j, then of view i] over the temperature; own: which key belongs to each row's sample."""
        parts = [query @ k.T + margin for k in keys]
        if own is not None:
            at = own[:, None]
            nearer = query.new_full(at.shape, -2 * margin)  # a positive is lowered by the margin, not raised by it
            parts[0] = parts[0].scatter_add(1, at, nearer)
            if self.same_view == "all":
                parts[1] = parts[1].scatter_add(1, at, nearer)
        logits = torch.cat(parts, dim=1) / self.temperature
        if own is None or self.same_view != "others":
            return logits
        # A query is no negative of itself. After the division, so that a temperature may be learned.
        return logits.scatter(1, own[:, None] + len(keys[0]), float("-inf"))

    def _gather_blocks(self) -> None:
        """Fills all_keys and all_queries, one [B, D] per view; among all keys this rank's own have their gradient."""
        with torch.no_grad():
            all_keys = [self._gather(k) for k in self.keys]
            if self.keys_learn:
                shared = self.queries is self.keys
                self.all_queries = all_keys if shared else [self._gather(q) for q in self.queries]
        self.all_keys = [k.index_copy(0, self.own, mine) for k, mine in zip(all_keys, self.keys, strict=True)]

    def _gather(self, x: Tensor) -> Tensor:
        return collectives.gather(x.detach(), self.rank_sizes)


def _own_places(size: int, rank_sizes: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """int64 [size]: where this rank's samples stand in the global batch. rank_sizes None: every rank has `size`."""
    first = collectives.rank() * size if rank_sizes is None else sum(rank_sizes[: collectives.rank()])
    return torch.arange(first, first + size, device=device)

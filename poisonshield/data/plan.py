"""Which samples make up which batch: a pure function of (seed, epoch, the samples), computed alike by every rank.

Shards are permuted and taken in windows; samples are shuffled inside a window, so a cold disk is asked for a few shards
at a time. With no more shards than a window (CIFAR-10 by default) that is a full shuffle. Larger sets give up some
mixing for locality. Order is by Philox words of the sample's key, not by a library's shuffle, so it is the same on
every machine and version, and within one window it does not depend on how the samples were dealt to shards.

An epoch of N samples at global batch G is ceil(N / G) batches whose sizes differ by at most one, each cut into one
contiguous part per rank. So each sample comes once, all ranks take the same number of steps, and no batch is tiny
(batch norm). What a global batch holds does not depend on the number of ranks or workers.
"""

import copy

import torch
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.random import philox_words, stream_of


def near_equal(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` sizes that differ by at most one, larger first."""
    base, extra = divmod(total, parts)
    return (base + 1,) * extra + (base,) * (parts - extra)


def random_rank(ids: Tensor, *, seed: int, epoch: int, purpose: str) -> Tensor:
    """A 62-bit random number for each id, int64 [N], to sort by."""
    words = philox_words(2, seed=seed, ids=ids, offset=epoch, stream=stream_of(purpose))
    return (words[:, 0] << 30) ^ (words[:, 1] >> 2)


def epoch_order(ids: Tensor, shard: Tensor, *, seed: int, epoch: int, window: int = 16) -> Tensor:
    """A permutation of the samples, int64 [N]. ids: hash of each key; shard: number of its shard, both int64 [N]."""
    order = torch.sort(random_rank(ids, seed=seed, epoch=epoch, purpose="sample order"), stable=True).indices
    num_shards = int(shard.max()) + 1
    if num_shards <= window:
        return order
    place = random_rank(torch.arange(num_shards), seed=seed, epoch=epoch, purpose="shard order")
    rank_of_shard = torch.sort(torch.sort(place, stable=True).indices).indices
    window_of = rank_of_shard[shard[order]] // window
    return order[torch.sort(window_of, stable=True).indices]


class Plan:
    """The batches of every epoch. `part(epoch, step, rank=, world=)` is what one rank reads.

    ids, shard: int64 [N]. batch_size is global, over all ranks. shuffle=False keeps index order (evaluation).
    """

    def __init__(
        self, ids: Tensor, shard: Tensor, *, batch_size: int, seed: int, shuffle: bool = True, window: int = 16
    ) -> None:
        if batch_size < 1 or window < 1:
            raise ConfigError(f"batch_size is {batch_size} and window {window}, at least 1 was wanted for both.")
        if len(ids) == 0:
            raise ConfigError("the data set is empty, so there is nothing to plan.")
        self.ids, self.shard, self.seed, self.shuffle, self.window = ids, shard, seed, shuffle, window
        self.steps = -(-len(ids) // batch_size)
        self.sizes = near_equal(len(ids), self.steps)
        self._starts = torch.tensor((0, *self.sizes)).cumsum(0).tolist()
        self._order: tuple[int, Tensor] | None = None

    def check_world(self, world: int) -> None:
        """Raise ConfigError if some rank would get nothing in some batch."""
        if self.sizes[-1] < world:
            raise ConfigError(
                f"{len(self.ids)} samples in {self.steps} batches of {self.sizes[-1]} or {self.sizes[0]} leave nothing "
                f"for some of {world} ranks.\n  A global batch size of {2 * world} is always enough if there are so "
                "many samples; or start fewer processes."
            )

    def order(self, epoch: int) -> Tensor:
        """All samples in the order of one epoch, int64 [N]; the last epoch asked for is kept."""
        if not self.shuffle:
            return torch.arange(len(self.ids))
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self.ids, self.shard, seed=self.seed, epoch=epoch, window=self.window)
            self._order = (epoch, order)
        return self._order[1]

    def batch(self, epoch: int, step: int) -> Tensor:
        """Sample numbers of the global batch, int64 [sizes[step]]."""
        return self.order(epoch)[self._starts[step] : self._starts[step + 1]]

    def twin(self) -> "Plan":
        """The same plan with a memory of its own, for another thread."""
        return copy.copy(self)  # what is kept is replaced as a whole

    def largest_part(self, world: int) -> int:
        """No part of a rank has more samples than this."""
        return near_equal(self.sizes[0], world)[0]

    def rank_sizes(self, step: int, world: int, *, epoch: int = 0) -> tuple[int, ...]:
        """How many samples of the global batch each rank holds, rank 0 first."""
        return near_equal(self.sizes[step], world)

    def part(self, epoch: int, step: int, *, rank: int = 0, world: int = 1) -> Tensor:
        """Sample numbers that one rank holds of the global batch: contiguous in it, in rank order."""
        sizes = self.rank_sizes(step, world)
        start = sum(sizes[:rank])
        return self.batch(epoch, step)[start : start + sizes[rank]]

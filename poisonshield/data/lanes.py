"""Which samples make up which batch, in lanes: a pure function of (seed, epoch, the manifest's counts).

The shards of an epoch are shuffled and dealt to a fixed number of lanes. A lane is a sequence of shards; inside a
window of them its samples are shuffled. A batch takes from each lane what its length is of the whole. A rank serves a
contiguous share of the lanes, so it needs the shards of these alone. What a global batch holds does not depend on how
many ranks there are; lanes are part of the order, ranks are not.

Memory and time are those of the shards' counts and of one window a lane, however many samples there are. Samples are
numbered in the manifest's order; no key and no shard is read to plan.
"""

import copy
import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.plan import near_equal, random_rank
from poisonshield.errors import ConfigError


@dataclass(frozen=True)
class _Epoch:
    """The lanes of one epoch: shards[l] their numbers in order, ends[l] samples up to and with each, lengths [L]."""

    shards: list[list[int]]
    ends: list[np.ndarray]
    lengths: np.ndarray


class LanePlan:
    """The batches of every epoch. `part(epoch, step, rank=, world=)` is what one rank reads.

    counts: samples of each shard. batch_size is global, over all ranks. window: shards that are open at once over all
    lanes, at least one a lane. Raises ConfigError for more lanes than shards.
    """

    def __init__(self, counts: tuple[int, ...], *, lanes: int, batch_size: int, seed: int, window: int = 16) -> None:
        if batch_size < 1 or window < 1 or lanes < 1:
            raise ConfigError(
                f"batch_size is {batch_size}, window {window} and lanes {lanes}: at least 1 was wanted for each."
            )
        if lanes > len(counts):
            raise ConfigError(
                f"data.lanes={lanes} is more than the data set has shards, {len(counts)}: a lane would be empty.\n"
                "  Set data.lanes lower, or import the data set with fewer --samples-per-shard."
            )
        self.counts, self.lanes, self.seed = counts, lanes, seed
        self.window = max(1, window // lanes)
        self.total = sum(counts)
        self.starts = np.cumsum([0, *counts])
        self.steps = -(-self.total // batch_size)
        self.sizes = near_equal(self.total, self.steps)
        self._before = np.cumsum([0, *self.sizes])
        self._epochs: dict[int, _Epoch] = {}
        self._orders: dict[int, tuple[int, int, int, np.ndarray]] = {}

    def twin(self) -> "LanePlan":
        """The same plan with a memory of its own, for another thread."""
        twin = copy.copy(self)
        twin._epochs, twin._orders = {}, {}
        return twin

    def check_world(self, world: int) -> None:
        """Raise ConfigError if lanes cannot be shared out alike, or some rank could get nothing in some batch."""
        if self.lanes % world:
            raise ConfigError(
                f"data.lanes={self.lanes} cannot be shared out alike by {world} processes.\n"
                f"  Take as many processes as divide it, or a multiple of {world} as data.lanes from the start."
            )
        mine, largest = self.lanes // world, max(self.counts)
        even = len(self.counts) % self.lanes == 0 and min(self.counts) == largest
        shortest = self.total / self.lanes if even else max(self.total / self.lanes - largest, min(self.counts))
        needed = self.lanes + (mine + 1) * self.total / (mine * shortest)
        if world > 1 and self.sizes[-1] < needed:
            raise ConfigError(
                f"batches of {self.sizes[-1]} samples are too few for {self.lanes} lanes on {world} processes: one "
                f"could get nothing.\n  Set data.batch_size to {int(needed) + 2} or more, or data.lanes lower."
            )

    def largest_part(self, world: int) -> int:
        """No part of a rank has more samples than this."""
        mine = self.lanes // world
        share = min(1.0, mine * (1 / self.lanes + max(self.counts) / self.total))
        return min(self.sizes[0], int(self.sizes[0] * share + mine + self.lanes * share) + 1)

    def rank_sizes(self, step: int, world: int, *, epoch: int = 0) -> tuple[int, ...]:
        """How many samples of the global batch each rank holds, rank 0 first."""
        before, after = self._taken(epoch, step), self._taken(epoch, step + 1)
        return tuple((after - before).reshape(world, -1).sum(1).tolist())

    def batch(self, epoch: int, step: int) -> Tensor:
        """Sample numbers of the global batch, int64 [sizes[step]]."""
        return self.part(epoch, step)

    def part(self, epoch: int, step: int, *, rank: int = 0, world: int = 1) -> Tensor:
        """Sample numbers that one rank holds of the global batch: those of its lanes, lane by lane."""
        before, after = self._taken(epoch, step), self._taken(epoch, step + 1)
        mine = self.lanes // world
        lanes = range(rank * mine, (rank + 1) * mine)
        return torch.from_numpy(np.concatenate([self._read(epoch, lane, before[lane], after[lane]) for lane in lanes]))

    def _deal(self, epoch: int) -> _Epoch:
        """The lanes of an epoch: each shard in a shuffled order goes to the lane that has the fewest samples.

        Two epochs are kept, since workers read over the end of one.
        """
        if epoch not in self._epochs:
            place = random_rank(torch.arange(len(self.counts)), seed=self.seed, epoch=epoch, purpose="shard order")
            shards: list[list[int]] = [[] for _ in range(self.lanes)]
            fewest = [(0, lane) for lane in range(self.lanes)]
            for shard in torch.sort(place, stable=True).indices.tolist():
                samples, lane = fewest[0]
                heapq.heapreplace(fewest, (samples + self.counts[shard], lane))
                shards[lane].append(shard)
            ends = [np.cumsum([self.counts[s] for s in lane]) for lane in shards]
            self._epochs[epoch] = _Epoch(shards, ends, np.array([end[-1] for end in ends]))
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]

    def _taken(self, epoch: int, step: int) -> np.ndarray:
        """How many samples of each lane the batches before a step hold, int64 [L].

        Sample p of a lane of n stands at (p + 1/2) / n of the epoch; batches are cut from all samples in that order, of
        equal ones the lower lane first. So each lane ends with the epoch and no batch takes all from a few.
        """
        lengths, total = self._deal(epoch).lengths, int(self._before[step])
        if total >= self.total:
            return lengths
        level = total / self.total
        taken = np.minimum(np.floor(level * lengths + 0.5).astype(np.int64), lengths)
        taken += (taken < lengths) & ((taken + 0.5) / lengths <= level)
        taken -= (taken > 0) & ((taken - 0.5) / lengths > level)
        missing = total - int(taken.sum())
        sign = 1 if missing >= 0 else -1  # the next ones are added, or the last ones taken away
        heap = [(sign * (n + sign * 0.5) / lengths[lane], sign * lane) for lane, n in enumerate(taken.tolist())]
        heapq.heapify(heap)
        for _ in range(abs(missing)):
            lane = abs(heap[0][1])
            taken[lane] += sign
            heapq.heapreplace(heap, (sign * (taken[lane] + sign * 0.5) / lengths[lane], sign * lane))
        return taken

    def _read(self, epoch: int, lane: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers at places start to stop of a lane."""
        ends, found = self._deal(epoch).ends[lane], []
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right")) // self.window
            begin, order = self._order(epoch, lane, window)
            found.append(order[start - begin : stop - begin])
            start += len(found[-1])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _order(self, epoch: int, lane: int, window: int) -> tuple[int, np.ndarray]:
        """Where a window begins in its lane, and the sample numbers of its shards, shuffled; the last one is kept."""
        dealt, kept = self._deal(epoch), self._orders.get(lane)
        if kept is None or kept[:2] != (epoch, window):
            first = window * self.window
            shards = dealt.shards[lane][first : first + self.window]
            numbers = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in shards])
            place = random_rank(numbers, seed=self.seed, epoch=epoch, purpose="sample order")
            order = numbers[torch.sort(place, stable=True).indices].numpy()
            kept = (epoch, window, int(dealt.ends[lane][first - 1]) if first else 0, order)
            self._orders[lane] = kept
        return kept[2], kept[3]

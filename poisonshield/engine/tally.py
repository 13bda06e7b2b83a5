"""Which samples each epoch trained on, as one number: what proves that a run lost none and repeated none.

The number is the sum of the 8-byte BLAKE2b hashes of all keys, modulo 2^64: it does not depend on order, batches or
ranks, and a key that came twice counts twice. Ranks count for themselves and add up only when a line is logged or a
checkpoint is saved. Samples of a step that was dropped were not trained on and are not counted.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from poisonshield import collectives
from poisonshield.random import sample_ids

_HALF = 2**32


class Tally:
    """Counts batches and keys by epoch. batches_per_epoch: the stream's `steps_per_epoch`."""

    def __init__(self, batches_per_epoch: int, device: torch.device) -> None:
        self.batches_per_epoch, self.device = batches_per_epoch, device
        self._counts: dict[int, list[int]] = {}  # epoch -> batches, samples, sum of hashes
        self._begun_unseen, self._passed_over = False, -1

    def add(self, epoch: int, keys: Sequence[str], *, trained: bool) -> None:
        """Count a batch of an epoch. trained: whether its step moved the weights."""
        if self._begun_unseen:
            self._passed_over, self._begun_unseen = epoch, False
        if epoch == self._passed_over:
            return
        batches, samples, total = self._counts.get(epoch, (0, 0, 0))
        if trained:
            samples += len(keys)
            total = (total + int(sample_ids(keys).sum())) % 2**64
        self._counts[epoch] = [batches + 1, samples, total]

    def take(self, *, last: bool) -> list[dict[str, Any]]:
        """The epochs that ended since the last call, and with `last` the one that has not. All ranks call.

        Each as {"epoch", "count": samples trained on, "digest": 16 hex digits}, and "part": true if it has not ended.
        """
        due = [epoch for epoch in self._counts if last or self._has_ended(epoch)]
        rows: list[dict[str, Any]] = []
        for epoch, (_, samples, total) in zip(due, self._over_ranks(due), strict=True):
            rows.append({"epoch": epoch, "count": samples, "digest": f"{total:016x}"})
            if not self._has_ended(epoch):
                rows[-1]["part"] = True
        self._counts = {epoch: counts for epoch, counts in self._counts.items() if not self._has_ended(epoch)}
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What all ranks counted and nobody took yet. All ranks call, and all get the same."""
        epochs = sorted(self._counts)
        return {"epochs": [[e, *counts] for e, counts in zip(epochs, self._over_ranks(epochs), strict=True)]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from there, on any number of ranks: rank 0 takes the sums, and the others begin with none.

        None is what earlier versions saved: the epoch that goes on is then left out, as its beginning is not known.
        """
        if state is None:
            self._begun_unseen = True
            return
        first = collectives.rank() == 0
        self._counts = {
            epoch: [batches, *((samples, total) if first else (0, 0))]
            for epoch, batches, samples, total in state["epochs"]
        }

    def _has_ended(self, epoch: int) -> bool:
        return self._counts[epoch][0] == self.batches_per_epoch

    def _over_ranks(self, epochs: Iterable[int]) -> list[tuple[int, int, int]]:
        """(batches, samples, sum of hashes) of each epoch, samples and hashes added up over ranks."""
        mine = [self._counts[epoch] for epoch in epochs]
        if not mine:
            return []
        halves = [(samples, total // _HALF, total % _HALF) for _, samples, total in mine]  # no sum of these overflows
        sums = collectives.all_reduce_sum(torch.tensor(halves, dtype=torch.int64, device=self.device)).tolist()
        return [(m[0], n, (high * _HALF + low) % 2**64) for m, (n, high, low) in zip(mine, sums, strict=True)]

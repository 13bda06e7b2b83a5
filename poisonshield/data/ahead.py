"""Shards from afar are fetched before they are read, along the plan, while the batches before them are trained on."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from poisonshield.errors import PoisonShieldError

AT_ONCE = 4
"""Connections of a process."""

Needs = Iterator[tuple[int, int, list[int]]]
"""Epoch, step, and the shards that are read there."""

Reach = Callable[[int, int], None]
"""Says that a walk has come to this epoch and step."""


class Fetcher:
    """Fetches what a walk will read, as far ahead as `room` bytes, shared by the processes of the node.

    needs: in the order of the walk, which may have no end. sizes: bytes of each shard.
    """

    def __init__(self, fetch: Callable[[int], None], needs: Needs, *, sizes: list[int], room: float) -> None:
        self.fetch, self.sizes = fetch, sizes
        self.room = room / max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        self._shards = _first_uses(needs)
        self._reached: tuple[int, int] | None = None
        self._ahead: deque[tuple[tuple[int, int], int]] = deque()  # (epoch, step) and bytes of what is not reached yet
        self._turn, self._moved, self._over = threading.Lock(), threading.Event(), threading.Event()

    def reach(self, epoch: int, step: int) -> None:
        """Say that the walk has come so far."""
        self._reached = (epoch, step)
        self._moved.set()

    @contextmanager
    def running(self) -> Iterator[Reach]:
        """While open, threads fetch. Of a file that is on its way at the end, what came is kept for the next time."""
        threads = [threading.Thread(target=self._run, daemon=True, name=f"fetch {i}") for i in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        try:
            yield self.reach
        finally:
            self._over.set()
            self._moved.set()
            for thread in threads:
                thread.join(timeout=1)

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            with suppress(PoisonShieldError, OSError):  # whoever reads the shard meets the same fault and tells of it
                self.fetch(shard)

    def _next(self) -> int | None:
        """The next shard, once there is room for it and the walk is no more than an epoch behind; None at the end."""
        with self._turn:
            if self._over.is_set() or (need := next(self._shards, None)) is None:
                return None
            epoch, step, shard = need
            self._reached = self._reached or (epoch, -1)
            self._ahead.append(((epoch, step), self.sizes[shard]))
            while not self._over.is_set():
                self._moved.clear()
                while len(self._ahead) > 1 and self._ahead[0][0] <= self._reached:
                    self._ahead.popleft()
                fits = len(self._ahead) == 1 or sum(size for _, size in self._ahead) <= self.room
                if fits and epoch <= self._reached[0] + 1:
                    return shard
                self._moved.wait()
            return None


def _first_uses(needs: Needs) -> Iterator[tuple[int, int, int]]:
    """Epoch, step and shard, where the epoch reads a shard for the first time."""
    current, seen = -1, set[int]()
    for epoch, step, shards in needs:
        if epoch != current:
            current, seen = epoch, set()
        for shard in shards:
            if shard not in seen:
                seen.add(shard)
                yield epoch, step, shard

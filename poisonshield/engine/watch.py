"""Signs of life: who has not come to a step that takes much longer than steps usually do.

Each process writes the step that it has come to, and a count that a thread of it raises every few seconds, into the
store of the meeting. Rank 0 reads them only when a step is overdue, and says whose step is behind or whose count stands
still: a rank that waits for its data, one that was stopped, a host that cannot be reached.
"""

import datetime
import json
import logging
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from poisonshield.engine.meeting import Meeting

log = logging.getLogger(__name__)

SIGN_EVERY_S = 5.0
LEAST_S = 30.0
"""A step is not overdue before."""


class Watch:
    """Of one run. Does nothing without a meeting, which is where there is one process.

    factor: how many times the usual time of a step (the median of the last 50) makes it overdue.
    """

    def __init__(self, meeting: Meeting | None, factor: float) -> None:
        self.meeting, self.factor = meeting, factor
        self._usual: deque[float] = deque(maxlen=50)
        self._step = 0
        self._began: float | None = None
        self._over = threading.Event()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Signs are given, and rank 0 looks at them, until it is left."""
        if self.meeting is None:
            yield
            return
        store = self.meeting.store
        give = threading.Thread(target=self._give_signs, args=(store,), daemon=True)
        look = threading.Thread(target=self._look, args=(store,), daemon=True)
        give.start()
        if self.meeting.rank == 0:
            look.start()
        try:
            yield
        finally:
            self._over.set()

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Around the part of step `step` (from 1) that waits for other ranks."""
        self._step, self._began = step, time.monotonic()
        try:
            yield
        finally:
            self._usual.append(time.monotonic() - self._began)
            self._began = None

    def _give_signs(self, store: Any) -> None:
        assert self.meeting is not None
        count = 0
        with suppress(RuntimeError, dist.DistError):  # rank 0, or the host with the store, has gone
            while True:
                count += 1
                sign = {"step": self._step, "count": count, "host": socket.gethostname()}
                store.set(f"sign/{self.meeting.rank}", json.dumps(sign))
                if self._over.wait(SIGN_EVERY_S):
                    return

    def _look(self, store: Any) -> None:
        said = 0.0
        while not self._over.wait(SIGN_EVERY_S):
            began = self._began
            if began is None:
                said = 0.0
                continue
            waited = time.monotonic() - began
            usual = statistics.median(self._usual) if self._usual else 0.0
            if waited < max(LEAST_S, self.factor * usual, 2 * said):
                continue
            said = waited
            with suppress(RuntimeError, dist.DistError):
                self._say(self._find_late(store), waited, usual)

    def _find_late(self, store: Any) -> list[str]:
        """Who is behind, and who gives no sign, in words."""
        before = self._read(store)
        time.sleep(2 * SIGN_EVERY_S)
        late = []
        for rank, sign in self._read(store).items():
            if sign is None:
                late.append(f"rank {rank}, which gave no sign yet")
            elif sign == before[rank]:
                late.append(f"rank {rank} on {sign['host']}, which gives no sign of life")
            elif sign["step"] < self._step:
                late.append(f"rank {rank} on {sign['host']}, still before step {self._step}")
        return late

    def _read(self, store: Any) -> dict[int, dict[str, Any] | None]:
        assert self.meeting is not None
        keys = {rank: f"sign/{rank}" for rank in range(self.meeting.world)}
        return {rank: json.loads(store.get(key)) if store.check([key]) else None for rank, key in keys.items()}

    def _say(self, late: list[str], waited: float, usual: float) -> None:
        since = (datetime.datetime.now() - datetime.timedelta(seconds=waited)).strftime("%H:%M:%S")
        some = "; ".join([*late[:8], f"and {len(late) - 8} more"] if len(late) > 8 else late)
        log.warning("step %d has taken %.0f s since %s, and %.2g s are usual. Waiting for %s.", self._step, waited,
                    since, usual, some or "no rank that is known: all of them are at this step")  # fmt: skip

"""Preemption: SIGTERM or SIGUSR1 raises a flag, ranks agree on it at the next step boundary, save and leave.

The process then ends with exit code 75 ("try again later" in sysexits.h), so a wrapper can tell "requeue me" from done
(0) and failed (1). Under torchrun the launcher itself ends with 1 whatever its workers say. A second SIGTERM kills.
"""

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 75


class Preempted(SystemExit):
    """The run saved itself and stopped because it was told to; start it again with engine.resume=auto."""

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)
        self.step = step


class StopSignals:
    """While open, SIGTERM and SIGUSR1 only set `caught`. Outside the main thread signals cannot be caught."""

    numbers = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.caught = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._raise_flag) for number in self.numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        self.caught = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        log.warning("%s received: saving at the next step boundary, then leaving.", signal.Signals(number).name)

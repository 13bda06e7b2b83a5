"""Told to stop: SIGTERM, SIGUSR1 or Ctrl-C raises a flag, ranks agree on it at the next step boundary, save and leave.

The process then ends with exit code 75 ("try again later" in sysexits.h), so a wrapper can tell "requeue me" from done
(0) and failed (1); after Ctrl-C it ends with 130, as shells expect. Under torchrun the launcher itself ends with 1
whatever its workers say. Schedulers send SIGTERM more than once, so only a second Ctrl-C ends a run that is saving, and
a process that has saved and leaves takes no notice of another SIGTERM: it would end with that, and not with 75.
"""

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

PREEMPTED_EXIT_CODE = 75
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT

ECHO = 0.5
"""Seconds in which a second SIGINT is the same Ctrl-C: the terminal sends it to all, and a launcher passes it on."""


LEAVING_S = 60.0
"""How long a process that has saved may take to end, and is deaf to SIGTERM and SIGUSR1."""


class Preempted(SystemExit):
    """The run saved itself and stopped because it was told to; start it again with engine.resume=auto."""

    def __init__(self, step: int, *, interrupted: bool = False) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE if interrupted else PREEMPTED_EXIT_CODE)
        self.step = step


class StopSignals:
    """While open, SIGTERM, SIGUSR1 and SIGINT only set `caught`, and SIGINT `interrupted` too.

    A second SIGINT ends the process at once. Left by Preempted, SIGTERM and SIGUSR1 do nothing for LEAVING_S more.
    Outside the main thread signals cannot be caught.
    """

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.caught = self.interrupted = False
        self._before: dict[int, Any] = {}
        self._pid, self._since = os.getpid(), 0.0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._raise_flag) for number in self.numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        leaving = kind is not None and issubclass(kind, Preempted)
        for number, handler in self._before.items():
            signal.signal(number, handler if not leaving or number == signal.SIGINT else _be_deaf_before(handler))
        self._before = {}

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that was forked from this one: it is not the one that saves
            return
        now = time.monotonic()
        if number == signal.SIGINT and self.interrupted and now - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if number == signal.SIGINT and not self.interrupted:
            self.interrupted, self._since = True, now
            log.warning("Ctrl-C: saving at the next step boundary, then leaving. Once more: leave now, without saving.")
        elif not self.caught:
            log.warning("%s received: saving at the next step boundary, then leaving.", signal.Signals(number).name)
        self.caught = True


def _be_deaf_before(handler: Any) -> Callable[[int, FrameType | None], None]:
    """A handler that does nothing for LEAVING_S, and then puts `handler` back and lets it have the signal.

    Python's own end takes such handlers away before the process is gone, so from there on the signals are ignored.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        atexit.register(signal.signal, number, signal.SIG_IGN)
    end = time.monotonic() + LEAVING_S

    def be_deaf(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > end:
            signal.signal(number, handler)
            signal.raise_signal(number)

    return be_deaf

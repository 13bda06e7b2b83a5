"""Where the processes of a job meet: a small store of texts on the first one's host, and what they tell each other.

`meet` opens it and waits for nobody but rank 0, so that a process that cannot train says so at once, to the others too.
`Meeting.agree` waits for all, says for whom, and compares what each was told to do, before any weight is made: a rank
with another learning rate, other data or another version would train on in silence.
"""

import datetime
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import poisonshield
from poisonshield.errors import BackendError, ConfigError, PoisonShieldError, reason_of

log = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
"""Seconds between two lines about who is waited for."""
_LEAVE_S = 5.0  # how long rank 0, which holds the store, waits for the others to have read why nobody trains
_VARIABLES = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
_ADVICE = f"If nobody starts them, these are left over from another launch: unset {_VARIABLES}"
_PACKAGES = ("deepspeed", "diffusers", "transformers", "timm")


class Meeting:
    """The store, and which of `world` processes this one is. Built by `meet`."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._questions = 0

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError on every rank if one of them has other facts than rank 0; all ranks call.

        facts: by name, plain values that must be equal. The message names each rank that differs, its host, and the
        names with both values. Raises BackendError if a rank does not come within the store's timeout.
        """
        try:
            self._agree(facts)
        except RuntimeError as err:
            if isinstance(err, PoisonShieldError):
                raise
            raise BackendError(
                f"rank {self.rank} of {self.world} on {socket.gethostname()} lost the way to rank 0 at {_place()} "
                f"before training began: {reason_of(err)}\n  The messages of the other ranks say why."
            ) from err

    def _agree(self, facts: Mapping[str, Any]) -> None:
        self._questions += 1
        place = f"question {self._questions}"
        mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
        if self.rank == 0:
            self.store.set(f"{place}/first", json.dumps(mine))
        if other := compare(json.loads(self.store.get(f"{place}/first")), mine):
            self.store.set(f"{place}/other/{self.rank}", f"rank {self.rank} on {socket.gethostname()}: {other}")
            self.store.add(f"{place}/others", 1)
        self.gather(f"{place}/compared", "it has compared its settings")
        if not self.store.add(f"{place}/others", 0):
            return
        lines = "\n".join(f"  {line}" for line in self._read_all(f"{place}/other"))
        self._leave_together()
        raise ConfigError(
            f"the processes of this job were not told the same, so none of them trains:\n{lines}\n"
            "  Give all of them one command line, config, data set and installation."
        )

    def gather(self, place: str, what: str) -> None:
        """Return when every rank has called with this place. A line tells who is late, and what is not known of them.

        Raises BackendError after the store's timeout.
        """
        self.store.set(f"{place}/{self.rank}", socket.gethostname())
        self.store.add(f"{place}/count", 1)
        began, clock, pause = time.monotonic(), _clock(), 0.02
        lines = 1
        while self.store.add(f"{place}/count", 0) < self.world:
            if self.store.check(["refused"]):
                why = self.store.get("refused").decode()
                self._leave_together()
                raise ConfigError(why)
            waited = time.monotonic() - began
            if waited > self.store.timeout.total_seconds():
                raise BackendError(f"{self._name_late(place)} did not come within {waited:.0f} s")
            if self.rank == 0 and waited >= lines * SAY_EVERY_S:
                lines += 1
                log.warning("rank 0 waits for %s since %s: no word yet that %s. %s", self._name_late(place), clock,
                            what, _ADVICE)  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _name_late(self, place: str) -> str:
        late = [rank for rank in range(self.world) if not self.store.check([f"{place}/{rank}"])]
        some = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
        return f"{len(late)} of {self.world} processes (rank {some})"

    def _read_all(self, place: str) -> Iterator[str]:
        for rank in range(self.world):
            if self.store.check([f"{place}/{rank}"]):
                yield self.store.get(f"{place}/{rank}").decode()

    def _leave_together(self) -> None:
        """The store ends with rank 0, so that one goes last."""
        count, end = self.store.add("left", 1), time.monotonic() + _LEAVE_S
        while self.rank == 0 and count < self.store.add("here", 0) and time.monotonic() < end:
            time.sleep(0.05)
            count = self.store.add("left", 0)

    def refuse(self, why: str) -> None:
        """Tell all that wait for this process, or will, that they wait in vain: they raise ConfigError with `why`."""
        self.store.set("refused", why)
        self._leave_together()

    def refuse_wrong_numbers(self) -> None:
        """Raise ConfigError if another process calls itself by this rank, or counts another number of processes."""
        told = {"world": self.world, "host": socket.gethostname(), "process": os.getpid()}
        if self.store.add(f"rank {self.rank}", 1) > 1:
            other = json.loads(self.store.get(f"told/{self.rank}"))
            self._refuse_numbers(
                f"two processes call themselves rank {self.rank}: {other['process']} on {other['host']}, and "
                f"{told['process']} on {told['host']}. Give each a RANK of its own."
            )
        self.store.set(f"told/{self.rank}", json.dumps(told))
        self.store.add("here", 1)
        first = json.loads(self.store.get("told/0"))
        if first["world"] != self.world:
            self._refuse_numbers(
                f"rank {self.rank} on {told['host']} counts WORLD_SIZE={self.world} processes, and rank 0 on "
                f"{first['host']} counts {first['world']}. Start all of them with one number."
            )

    def _refuse_numbers(self, why: str) -> None:
        self.refuse(why)
        raise ConfigError(why)


def meet(timeout: datetime.timedelta) -> Meeting:
    """The meeting of the processes that the launcher's variables name, which rank 0 has come to.

    Raises BackendError if there is no way to the place within the timeout, ConfigError if numbers do not fit together.
    """
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meeting = Meeting(_open_store(rank, world, timeout), rank, world)
        meeting.refuse_wrong_numbers()
    except (RuntimeError, ValueError, KeyError, OSError) as err:
        if isinstance(err, ConfigError):
            raise
        why = f"{err.args[0]} is not set" if isinstance(err, KeyError) else reason_of(err)
        raise BackendError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on {socket.gethostname()} could not join "
            f"the others at {_place()}: {why}\n"
            "  Are all processes started, with one MASTER_ADDR and MASTER_PORT? Where the host name resolves to "
            f"loopback, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network's interface. {_ADVICE}"
        ) from err
    return meeting


def _open_store(rank: int, world: int, timeout: datetime.timedelta) -> Any:
    """The store, which torchrun's agent holds for its ranks, and rank 0 where another launcher started them."""
    global _meetings
    _meetings += 1
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if (address, port) not in _stores:
        _stores[address, port] = _find_store(address, port, rank, world, timeout)
    # torchrun's store may outlive an attempt, and both a run.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"poisonshield/{attempt}/{_meetings}", _stores[address, port])


_stores: dict[tuple[str, int], Any] = {}
"""Of this process, by place: a second run meets at the same one, and rank 0 would not open it twice."""
_meetings = 0


def _find_store(address: str, port: int, rank: int, world: int, timeout: datetime.timedelta) -> Any:
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        with _telling(f"rank {rank} of {world} waits for rank 0 at {_place()}"):
            return _connect(address, port, timeout, holds=holds)
    except RuntimeError:
        if not holds:
            raise
        with suppress(RuntimeError):  # somebody has the port: perhaps another who calls itself rank 0, who says so then
            return _connect(address, port, datetime.timedelta(seconds=5), holds=False)
        raise


def _connect(address: str, port: int, timeout: datetime.timedelta, *, holds: bool) -> Any:
    return dist.TCPStore(address, port, is_master=holds, timeout=timeout, wait_for_workers=False, multi_tenant=True)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Say `what` and since when, again and again until it is over."""
    over, clock = threading.Event(), _clock()

    def tell() -> None:
        while not over.wait(SAY_EVERY_S):
            log.warning("%s since %s. %s", what, clock, _ADVICE)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _clock() -> str:
    return datetime.datetime.now().strftime("%H:%M:%S")


def compare(first: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """Every name under which `mine` differs from `first`, with both values; "" for none."""
    names = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    return ", ".join(f"{n} is {mine.get(n, 'absent')}, and {first.get(n, 'absent')} on rank 0" for n in names)


def facts_of_process(device: torch.device) -> dict[str, Any]:
    """What ranks need in common so that their numbers are: versions, kind of device, and how precise that is."""
    return {
        "poisonshield": poisonshield.__version__,
        "poisonshield's code": _digest_of_code(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "kind of device": device.type,
        "default dtype": str(torch.get_default_dtype()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        **{name: os.environ.get(name) for name in ("NVIDIA_TF32_OVERRIDE", "POISONSHIELD_BACKEND")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest_of_code() -> str:
    """So that two checkouts of one version are told apart."""
    root, digest = Path(poisonshield.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_current: list[Meeting] = []


def current() -> Meeting | None:
    """The meeting that this process takes part in, if it joined one."""
    return _current[-1] if _current else None


@contextmanager
def taking_part(meeting: Meeting) -> Iterator[None]:
    """What `current` gives inside. An error there is told to the processes that wait for this one to get ready."""
    _current.append(meeting)
    try:
        yield
    except Exception as err:
        with suppress(RuntimeError):  # rank 0, which holds the store, has gone
            meeting.refuse(f"rank {meeting.rank} on {socket.gethostname()}: {type(err).__name__}: {reason_of(err)}")
        raise
    finally:
        _current.pop()

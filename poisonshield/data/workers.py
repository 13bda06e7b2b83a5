"""Processes that read for a stream, and put what they read into memory that they share with it.

torch's DataLoader deals out the work and tells of a process that is lost; pixels do not go through it. A batch that it
hands over as a tensor is new shared memory each time, and its pages cost each side about as much as decoding does. Here
a ring of slots is written over and over: a slot is free again when the next batch is asked for. For a CUDA device the
loader hands tensors over after all, since a thread of it copies them into pinned memory.
"""

import atexit
import multiprocessing
import multiprocessing.process
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poisonshield.data.bad import Faults, read_good
from poisonshield.data.source import BadSample, Place, Source
from poisonshield.errors import DataError, PoisonShieldError

Read = tuple[int, int, Tensor, Tensor, Faults]
"""Epoch, step, sample numbers int64 [b], pixels uint8 [b, 3, H, W], and the faults of samples that were left out."""

_AHEAD = 2  # batches that each worker reads before they are asked for


def read_in_workers(
    source: Source, walk: Callable[[], Iterator[Place]], *, workers: int, largest: int, pin: bool
) -> Iterator[Read]:
    """The walk with pixels, read ahead by `workers` processes. At most `largest` samples a step.

    Without `pin` the pixels are lent: they hold until the next item is asked for. With it they lie in pinned memory.
    Raises DataError for what cannot be read, and for a process that was killed.
    """
    ring = None if pin else _make_ring(source, next(walk())[2], slots=_AHEAD * workers + 2, largest=largest)
    requests = _Requests(walk, slots=_AHEAD * workers + 2)
    loader = torch.utils.data.DataLoader(
        _Reader(source, ring),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else the loader draws from the global generator, and workers change a run
    )
    for item in _tell_of_lost_worker(loader):
        if isinstance(item, PoisonShieldError):
            raise item
        pixels, taken, faults = item
        slot, (epoch, step, indices) = requests.take()
        if faults:
            indices = torch.tensor(taken)
        yield epoch, step, indices, pixels if ring is None else ring[slot, : len(indices)], faults


def _make_ring(source: Source, first: Tensor, *, slots: int, largest: int) -> Tensor:
    """uint8 [slots, largest, 3, H, W] that other processes see. Its pages are taken when they are first written to.

    first: samples of which one is read before, so that no memory is made for a size that the images do not have. That
    also imports the decoder before the workers are forked, once for all.
    """
    height, width = _measure_one(source, first)
    shape = (slots, largest, height, width, 3)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape).permute(0, 1, 4, 2, 3)


def _measure_one(source: Source, numbers: Tensor) -> torch.Size:
    for number in numbers.split(1):
        try:
            return source.read(number).shape[2:]
        except BadSample:
            if not source.bad_limit:
                raise
    return read_good(source, numbers)[1].shape[2:]  # it tells that all are bad


class _Requests:
    """The walk in the form that torch's DataLoader asks for: (slot, sample numbers). What was asked for comes back in
    the same order, so nothing but pixels has to travel back."""

    def __init__(self, walk: Callable[[], Iterator[Place]], *, slots: int) -> None:
        self.walk, self.slots = walk, slots
        self.asked: deque[tuple[int, Place]] = deque()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for number, place in enumerate(self.walk()):
            assert len(self.asked) < self.slots - 1, "a slot would be written to while it is lent"
            self.asked.append((number % self.slots, place))
            yield number % self.slots, place[2].numpy()

    def take(self) -> tuple[int, Place]:
        """The slot and place of the item that has come."""
        return self.asked.popleft()


class _Reader(torch.utils.data.Dataset):
    """What a worker does with a request. Errors are handed over as values: raised there, the loader would bury their
    words under a worker's traceback."""

    def __init__(self, source: Source, ring: Tensor | None) -> None:
        self.source, self.ring = source, ring

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Any:
        slot, numbers = request
        try:
            out = None if self.ring is None else self.ring[slot, : len(numbers)]
            taken, pixels, faults = read_good(self.source, torch.from_numpy(numbers), out=out)
            return pixels if out is None else slot, taken.tolist() if faults else None, faults
        except PoisonShieldError as err:
            return err


def _outlive_signals(_: int) -> None:
    """In a worker: what stops a whole job is for the process that trains, which saves and then ends its workers.

    A terminal and a scheduler send it to all of them. The loader's own SIGTERM may be the second, which ends a worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _tell_of_lost_worker(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's items. Raises DataError, where torch raises RuntimeError, if a worker was killed.

    A worker outlives the one SIGTERM that it gets when Python ends after an error, and Python would wait for it: it is
    killed before.
    """
    before = set(multiprocessing.active_children())
    items = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    atexit.register(_kill_all, workers)
    try:
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as err:
        # a reader that dies while it hands something over breaks the connection
        if isinstance(err, RuntimeError) and not any(sign in str(err) for sign in ("DataLoader worker", "ancdata")):
            raise
        why = (str(err).splitlines() or [type(err).__name__])[0].strip()
        raise DataError(
            f"a process that reads data was killed ({why})\n"
            "  Often memory ran out: set data.workers or data.window lower. Go on with engine.resume=auto."
        ) from err


def _kill_all(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()

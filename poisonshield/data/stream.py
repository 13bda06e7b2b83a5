"""The Stream over a source: endless, exactly once an epoch, resumable after any batch.

The plan says which samples form batch (epoch, step); workers only read and decode what it says. The position counts
batches handed out, so what workers have prefetched is read again after a restart: nothing is lost or repeated.
"""

import atexit
import multiprocessing
import multiprocessing.process
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.plan import Plan
from poisonshield.data.source import Source, batch_of, read_batch
from poisonshield.errors import CheckpointError, ConfigError, DataError, PoisonShieldError

Stage = Callable[[Batch], Batch]


class ShardStream:
    """Batches of one rank, epoch after epoch, without end.

    batch_size: global, over all `world` ranks. workers: processes that decode (0: none). stages: `Batch -> Batch`,
    applied in order on the device. Yields Batch with keys, x float32 [b, 3, H, W] in [0, 1], y int64 [b], epoch, draw
    (the epoch again), and rank_sizes when world > 1. Raises ConfigError if a batch has fewer samples than ranks;
    reading raises DataError, from a worker too. One iterator at a time: the position belongs to the stream.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        shuffle: bool = True,
        stages: Sequence[Stage] = (),
        device: torch.device | str | None = None,
        window: int = 16,
    ) -> None:
        if not 0 <= rank < world or workers < 0:
            raise ConfigError(f"rank {rank} of {world} with {workers} workers: 0 <= rank < world, workers >= 0 wanted.")
        self.plan = Plan(source.ids, source.shard, batch_size=batch_size, seed=seed, shuffle=shuffle, window=window)
        self.plan.check_world(world)
        self.source, self.rank, self.world, self.workers = source, rank, world, workers
        self.stages = tuple(stages)
        self.device = torch.device(device) if device is not None else None
        self.steps_per_epoch = self.plan.steps
        self._epoch = self._step = 0
        self._fingerprint = {
            "data": source.digest,
            "samples": len(source),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "window": window,
        }

    def __iter__(self) -> Iterator[Batch]:
        for epoch, step, indices, pixels in self._read_on():
            batch = batch_of(self.source, indices, pixels, device=self.device, epoch=epoch)
            if self.world > 1:
                batch = batch.replace(rank_sizes=self.plan.rank_sizes(step, self.world))
            for stage in self.stages:
                batch = stage(batch)
            self._epoch, self._step = (epoch, step + 1) if step + 1 < self.plan.steps else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The next batch's (epoch, step), and what the plan was made from. Plain numbers and text."""
        return {"epoch": self._epoch, "step": self._step, "plan": dict(self._fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter()`; ranks and workers may differ from those that saved it.

        Raises CheckpointError naming what differs if the plan was made from other data or settings.
        """
        if differing := [k for k, mine in self._fingerprint.items() if state["plan"].get(k) != mine]:
            lines = [f"  {k}: saved {state['plan'].get(k)!r}, now {self._fingerprint[k]!r}" for k in differing]
            raise CheckpointError(
                "\n".join(["the saved position belongs to another order of samples:", *lines])
                + "\n  Resume with the data and settings of the saved run, or start a new run folder."
            )
        if not 0 <= state["step"] < self.plan.steps or state["epoch"] < 0:
            where = f"epoch {state['epoch']}, step {state['step']}"
            raise CheckpointError(f"{where} is no position: an epoch has {self.plan.steps} steps. State is damaged.")
        self._epoch, self._step = state["epoch"], state["step"]

    def _walk(self) -> Iterator[tuple[int, int, Tensor]]:
        """(epoch, step, this rank's sample numbers) from the current position on."""
        epoch, step = self._epoch, self._step
        while True:
            for s in range(step, self.plan.steps):
                yield epoch, s, self.plan.part(epoch, s, rank=self.rank, world=self.world)
            epoch, step = epoch + 1, 0

    def _read_on(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The walk with pixels, uint8 [b, 3, H, W], read here or by workers."""
        if self.workers == 0:
            for epoch, step, indices in self._walk():
                yield epoch, step, indices, self.source.read(indices)
            return
        loader = torch.utils.data.DataLoader(
            _Reader(self.source),
            batch_size=None,
            sampler=_Sampler(self._walk),
            num_workers=self.workers,
            pin_memory=self.device is not None and self.device.type == "cuda",
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else the loader draws from the global generator, and workers change a run
        )
        for item in _tell_of_lost_worker(loader):
            if isinstance(item, PoisonShieldError):
                raise item
            yield tuple(item)


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


class _Sampler:
    """The walk in the form that torch's DataLoader asks for."""

    def __init__(self, walk: Callable[[], Iterator[Any]]) -> None:
        self._walk = walk

    def __iter__(self) -> Iterator[Any]:
        return self._walk()


class _Reader(torch.utils.data.Dataset):
    """What a worker does with one step of the walk. Errors are handed over as values: raised there, the loader would
    bury their words under a worker's traceback."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, item: tuple[int, int, Tensor]) -> Any:
        epoch, step, indices = item
        try:
            return epoch, step, indices, self.source.read(indices)
        except PoisonShieldError as err:
            return err


def evaluate_batches(
    source: Source,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    stages: Sequence[Stage] = (),
) -> Iterator[Batch]:
    """Each sample once, in index order; with world > 1 this rank's part of each global batch, rank_sizes set."""
    device = torch.device(device) if device is not None else None
    plan = Plan(source.ids, source.shard, batch_size=batch_size, seed=0, shuffle=False)
    plan.check_world(world)
    for step in range(plan.steps):
        batch = read_batch(source, plan.part(0, step, rank=rank, world=world), device=device)
        if world > 1:
            batch = batch.replace(rank_sizes=plan.rank_sizes(step, world))
        for stage in stages:
            batch = stage(batch)
        yield batch

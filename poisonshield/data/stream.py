"""The Stream over a source: endless, exactly once an epoch, resumable after any batch.

The plan says which samples form batch (epoch, step); workers only read and decode what it says. The position counts
batches handed out, so what workers have prefetched is read again after a restart: nothing is lost or repeated.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.data.bad import BadCount, read_good
from poisonshield.data.lanes import LanePlan
from poisonshield.data.plan import Plan
from poisonshield.data.source import Place, Source, batch_of
from poisonshield.data.workers import Read, read_in_workers
from poisonshield.errors import CheckpointError, ConfigError

Stage = Callable[[Batch], Batch]


class ShardStream:
    """Batches of one rank, epoch after epoch, without end.

    batch_size: global, over all `world` ranks. workers: processes that decode (0: none). stages: `Batch -> Batch`,
    applied in order on the device. Yields Batch with keys, x float32 [b, 3, H, W] in [0, 1], y int64 [b], epoch, draw
    (the epoch again), and rank_sizes when world > 1. Raises ConfigError if a batch has fewer samples than ranks;
    reading raises DataError, from a worker too. One iterator at a time: the position belongs to the stream.

    lanes: None orders samples by their keys, over windows of shards (plan.py); a number deals the shards to so many
    lanes that ranks share, so that a rank needs its own shards only, and no key to plan (lanes.py).
    keep_bytes: the first stage takes x as it was read, uint8 of any strides, which spares a float copy of whole images.
    It may not keep them, as their memory is written to again: a batch goes on with the pixels that the stage put in
    their place, or without x. stage_seconds: how long stages took so far, on the host's clock, so that time
    spent on augmentation can be told from waiting for data.
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
        keep_bytes: bool = False,
        lanes: int | None = None,
    ) -> None:
        if lanes is not None and not shuffle:
            raise ConfigError("lanes are an order of their own, and shuffle=False asks for that of the index.")
        if keep_bytes and not stages:
            raise ConfigError("keep_bytes hands bytes to the first stage, and there is none. Give stages, or leave it.")
        if not 0 <= rank < world or workers < 0:
            raise ConfigError(f"rank {rank} of {world} with {workers} workers: 0 <= rank < world, workers >= 0 wanted.")
        self.plan: Plan | LanePlan
        if lanes is None:
            self.plan = Plan(source.ids, source.shard, batch_size=batch_size, seed=seed, shuffle=shuffle, window=window)
        else:
            self.plan = LanePlan(source.counts, lanes=lanes, batch_size=batch_size, seed=seed, window=window)
        self.plan.check_world(world)
        self.source, self.rank, self.world, self.workers = source, rank, world, workers
        self.stages, self.keep_bytes, self.stage_seconds = tuple(stages), keep_bytes, 0.0
        self.device = torch.device(device) if device is not None else None
        self.bad = BadCount(source.bad_limit)
        self.steps_per_epoch = self.plan.steps
        self._epoch = self._step = 0
        self._fingerprint = {
            "data": source.digest,
            "samples": len(source),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "window": window,
        } | ({} if lanes is None else {"lanes": lanes})

    def __iter__(self) -> Iterator[Batch]:
        for epoch, step, indices, pixels in self._read_on():
            batch = batch_of(self.source, indices, pixels, device=self.device, epoch=epoch, keep_bytes=self.keep_bytes)
            if self.world > 1:
                batch = batch.replace(rank_sizes=self.plan.rank_sizes(step, self.world, epoch=epoch))
            start = time.perf_counter()
            for stage in self.stages:
                batch = stage(batch)
                if batch.x is not None and batch.x.dtype == torch.uint8:
                    batch = batch.replace(x=None)  # they were lent
            self.stage_seconds += time.perf_counter() - start
            self._epoch, self._step = (epoch, step + 1) if step + 1 < self.plan.steps else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The next batch's (epoch, step), and what the plan was made from. Plain numbers and text."""
        return {"epoch": self._epoch, "step": self._step, "plan": dict(self._fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter()`; ranks and workers may differ from those that saved it.

        Raises CheckpointError naming what differs if the plan was made from other data or settings.
        """
        saved, mine = state["plan"], self._fingerprint
        if differing := [k for k in {**mine, **saved} if saved.get(k) != mine.get(k)]:
            lines = [f"  {k}: saved {saved.get(k)!r}, now {mine.get(k)!r}" for k in differing]
            raise CheckpointError(
                "\n".join(["the saved position belongs to another order of samples:", *lines])
                + "\n  Resume with the data and settings of the saved run, or start a new run folder."
            )
        if not 0 <= state["step"] < self.plan.steps or state["epoch"] < 0:
            where = f"epoch {state['epoch']}, step {state['step']}"
            raise CheckpointError(f"{where} is no position: an epoch has {self.plan.steps} steps. State is damaged.")
        self._epoch, self._step = state["epoch"], state["step"]

    def _walk(self, plan: Plan | LanePlan | None = None) -> Iterator[Place]:
        """(epoch, step, this rank's sample numbers) from the current position on."""
        plan = plan or self.plan
        epoch, step = self._epoch, self._step
        while True:
            for s in range(step, self.plan.steps):
                yield epoch, s, plan.part(epoch, s, rank=self.rank, world=self.world)
            epoch, step = epoch + 1, 0

    def _read_on(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The walk with pixels, uint8 [b, 3, H, W], fetched before, and without bad samples that may be left out.

        They are read here, or by workers, which lend them.
        """
        with self.source.fetching(self._walk(self.plan.twin())) as reach:
            for epoch, step, indices, pixels, faults in self._read():
                self.bad.note(faults)
                reach(epoch, step)
                yield epoch, step, indices, pixels

    def _read(self) -> Iterator[Read]:
        if self.workers > 0:
            pin = self.device is not None and self.device.type == "cuda"
            largest = self.plan.largest_part(self.world)
            yield from read_in_workers(self.source, self._walk, workers=self.workers, largest=largest, pin=pin)
            return
        for epoch, step, indices in self._walk():
            yield epoch, step, *read_good(self.source, indices)


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
    bad = BadCount(source.bad_limit)
    for step in range(plan.steps):
        indices, pixels, faults = read_good(source, plan.part(0, step, rank=rank, world=world))
        bad.note(faults)
        batch = batch_of(source, indices, pixels, device=device)
        if world > 1:
            batch = batch.replace(rank_sizes=plan.rank_sizes(step, world))
        for stage in stages:
            batch = stage(batch)
        yield batch

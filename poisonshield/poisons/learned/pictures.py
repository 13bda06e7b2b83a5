"""The training pictures of a poison that is trained: all of them as bytes, in the order of their ids."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poisonshield.errors import DataError
from poisonshield.poisons.base import Labelled
from poisonshield.random import KeyedRandom, philox_words, sample_ids, stream_of

LARGE = 2**31
"""Bytes from which on a table lies in a file that is mapped into memory, where there is a folder for it."""


def make_table(shape: tuple[int, ...], dtype: torch.dtype, file: Path | None) -> Tensor:
    """Zeros of int8 or uint8; in `file`, mapped, where one is given and they are large."""
    size = 1
    for side in shape:
        size *= side
    if file is None or size < LARGE:
        return torch.zeros(shape, dtype=dtype)
    file.unlink(missing_ok=True)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)


@dataclass(frozen=True)
class Pictures:
    """levels uint8 [N, 3, H, W], y int64 [N], ids int64 [N] in rising order. device: where batches of them go."""

    levels: Tensor
    y: Tensor
    ids: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.y)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [B, 3, H, W] in [0, 1] and y int64 [B] of these rows, on the device."""
        return self.levels[rows].to(self.device).float().div_(255), self.y[rows].to(self.device)

    def random(self, rows: Tensor, seed: int, draw: int, scope: str) -> KeyedRandom:
        """Numbers of these rows' samples; draw: which time it is."""
        return KeyedRandom(seed, self.ids[rows].to(self.device), draw, scope)

    def in_turn(self, size: int) -> tuple[Tensor, ...]:
        """Rows of batches, each picture once."""
        return torch.arange(len(self)).split(size)

    def shuffled(self, size: int, seed: int, step: int) -> Tensor:
        """Rows of training batch number `step`, counted on over epochs, each of which has an order of its own."""
        epoch, at = divmod(step, -(-len(self) // size))
        lots = philox_words(1, seed=seed, ids=self.ids, offset=epoch, stream=stream_of("poison order"))[:, 0]
        return lots.argsort(stable=True).split(size)[at]

    def share(self, share: float, seed: int) -> "Pictures":
        """A part of them, drawn by seed: the share of all, at least one."""
        if share >= 1:
            return self
        lots = philox_words(1, seed=seed, ids=self.ids, stream=stream_of("poison share"))[:, 0]
        rows = lots.argsort(stable=True)[: max(1, round(share * len(self)))].sort().values
        return Pictures(self.levels[rows], self.y[rows], self.ids[rows], self.device)


def collect(batches: Iterable[Labelled], device: torch.device, owner: str, file: Path | None = None) -> Pictures:
    """All pictures of these checked batches. Raises DataError for none, or for two with one key."""
    parts = list(_as_bytes(batches))
    if not parts:
        raise DataError(f"poison {owner} is trained on the pictures, and was shown none.")
    ids = torch.cat([p[2] for p in parts])
    order = ids.argsort()
    ids = ids[order]
    if bool((ids[1:] == ids[:-1]).any()):
        raise DataError(f"poison {owner} keeps a change for each key; two pictures have one key. Give each its own.")
    y, shape = torch.cat([p[1] for p in parts])[order], parts[0][0].shape[1:]
    levels, at = make_table((len(ids), *shape), torch.uint8, file), 0
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    while parts:  # each part is let go once it is in its place
        pixels = parts.pop(0)[0]
        levels[place[at : at + len(pixels)]] = pixels
        at += len(pixels)
    return Pictures(levels, y, ids, device)


def _as_bytes(batches: Iterable[Labelled]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in batches:
        yield (batch.x * 255).round().to("cpu", torch.uint8), batch.y.cpu(), sample_ids(batch.keys)

"""Pictures with captions held in memory, as an endless stream in a new random order every epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poisonshield import world
from poisonshield.batch import Batch
from poisonshield.errors import CheckpointError, ConfigError


class CaptionedStream:
    """Batches of this rank: keys, x float32 [b, 3, H, W] in [0, 1], captions, epoch. Incomplete batches are left out.

    pixels uint8 [N, 3, H, W]. batch_size: global, a multiple of `world_size`.
    """

    def __init__(
        self, pixels: Tensor, captions: Sequence[str], *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size or batch_size > len(pixels):
            raise ConfigError(
                f"a batch of {batch_size} from {len(pixels)} pictures on {world_size} ranks: it must be a multiple of "
                "the ranks and no larger than the set."
            )
        self.pixels, self.captions, self.batch_size, self.seed = pixels, tuple(captions), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(pixels) // batch_size
        self.position, self.stage_seconds = 0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        share = self.batch_size // self.world_size
        while True:
            epoch, done = divmod(self.position, self.steps_per_epoch)
            order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(self.seed * 7919 + epoch))
            for step in range(done, self.steps_per_epoch):
                first = step * self.batch_size + self.rank * share
                chosen = order[first : first + share]
                # Before the batch is handed out: a state saved while it is in use goes on after it.
                self.position += 1
                yield Batch(
                    keys=tuple(str(i) for i in chosen.tolist()),
                    x=self.pixels[chosen].float() / 255,
                    captions=tuple(self.captions[i] for i in chosen.tolist()),
                    epoch=epoch,
                    draw=epoch,
                )

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and of what."""
        return {
            "position": self.position,
            "pictures": len(self.pixels),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next `iter()`. Raises CheckpointError if it was another set, batch or seed."""
        mine = self.state_dict()
        differing = [k for k in ("pictures", "batch_size", "seed") if state[k] != mine[k]]
        if differing:
            raise CheckpointError(f"the saved position belongs to other settings: {', '.join(differing)} differ.")
        self.position = state["position"]


def rendered(count: int, *, seed: int) -> tuple[Tensor, list[str]]:
    """The first `count` pictures of the rendered world as uint8 [count, 3, 64, 64], and their captions."""
    pixels = torch.empty(count, 3, world.SIZE, world.SIZE, dtype=torch.uint8)
    captions = []
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        picture = world.render(i, seed=seed)
        pixels[i] = (picture.x * 255).round().to(torch.uint8)
        captions.append(world.caption(picture, generator))
    return pixels, captions

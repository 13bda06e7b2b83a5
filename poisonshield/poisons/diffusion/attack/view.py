"""What a poison sees of some pictures when it is asked for a gradient."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from poisonshield.poisons.diffusion.attack.plan import Box
from poisonshield.random import KeyedRandom


@dataclass(frozen=True)
class View:
    """A tile of some pictures at one step."""

    keys: tuple[str, ...]
    """The pictures' keys."""
    x: Tensor
    """Pixels [B, 3, h, w] in [0, 1]."""
    rng: KeyedRandom
    """This step's numbers of this tile."""
    shared: KeyedRandom
    """This step's numbers that all tiles of a picture have in common: its timestep."""
    box: Box
    """Where the tile lies in the padded picture."""
    padded: tuple[int, int]
    """The size of that picture."""
    mask: Tensor | None
    """Weights [B, 1, h', w'] of the latents' cells; None where no mask weighs the loss."""
    area: Tensor | None
    """The mask's sum over the whole picture, [B]; None with it."""
    memo: Mapping[str, Tensor]
    """What the poison's `prepare` gave for this tile of the clean pictures, rows [B, ...]."""

    def rows(self, rows: list[int], keys: tuple[str, ...]) -> "View":
        """The view of these rows alone (a row may come several times), under these keys."""
        return replace(
            self,
            keys=keys,
            x=self.x[rows],
            mask=None if self.mask is None else self.mask[rows],
            area=None if self.area is None else self.area[rows],
            memo={name: value[rows] for name, value in self.memo.items()},
        )

    def unmasked(self) -> "View":
        """The same, with every cell of the latents counting alike."""
        return replace(self, mask=None, area=None)

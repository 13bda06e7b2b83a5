"""The contract of mask providers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_SMALL, _LARGE = 0.02, 0.90


def looks_wrong(area: float) -> bool:
    """Whether a mask of this share of the picture is probably a mistake: tiny, or nearly all of it."""
    return not _SMALL <= area <= _LARGE


class MaskProvider(ABC):
    """`provider(batch, model, words)` is how much each pixel of batch.x belongs to the concept.

    needs_word: whether it looks for what the concept is called, with the model's help.
    """

    name: ClassVar[str]
    needs_word: ClassVar[bool] = False

    def __init__(self, *, seed: int, box: float) -> None:
        """box: side of the centred rectangle that the concept is supposed to fill, as a share of the picture's."""
        self.seed, self.box = seed, box

    @abstractmethod
    def __call__(self, batch: Batch, model: LatentDiffusion | None, words: Sequence[str] | None) -> Tensor:
        """Masks [B, 1, H, W] in [0, 1], on the device of batch.x. words: one per picture. A picture's mask depends on
        its pixels, its key up to `#` and its word alone. Raises ConfigError for what is missing.
        """

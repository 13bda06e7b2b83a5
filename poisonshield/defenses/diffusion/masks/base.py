"""The contract of mask providers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_SMALL, _LARGE = 0.02, 0.90


def looks_wrong(area: float) -> bool:
    """Whether a mask of this share of the picture is probably a mistake: tiny, or nearly all of it."""
    return not _SMALL <= area <= _LARGE


class WordSettings(Settings):
    """Settings of masks that look for a word."""

    word: str | None = Field(
        None, min_length=1, description="What the concept is called; null for the word that learning starts from."
    )


class MaskProvider(ABC):
    """`provider(batch, model, words)` is how much each pixel of batch.x belongs to the concept.

    Built as `SomeMask(SomeMask.Config(...), seed=seed)`. needs_word: whether it looks for what the concept is called,
    with the model's help; its Config is then a WordSettings.
    """

    name: ClassVar[str]
    needs_word: ClassVar[bool] = False

    class Config(Settings):
        """No settings, unless a mask has its own."""

    def __init__(self, config: Any = None, *, seed: int = 0) -> None:
        self.config, self.seed = config or self.Config(), seed

    @abstractmethod
    def __call__(self, batch: Batch, model: LatentDiffusion | None, words: Sequence[str] | None) -> Tensor:
        """Masks [B, 1, H, W] in [0, 1], on the device of batch.x. words: one per picture. A picture's mask depends on
        its pixels, its key up to `#` and its word alone. Raises ConfigError for what is missing.
        """

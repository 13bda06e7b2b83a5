"""The contract of mask providers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_SMALL, _LARGE = 0.02, 0.90  # shares of the picture


def looks_wrong(area: float) -> bool:
    """Whether a mask of this share of the picture is probably a mistake: tiny, or nearly all of it."""
    return not _SMALL <= area <= _LARGE


class MaskProvider(ABC):
    """`provider(batch, model, words)` is how much each pixel of batch.x belongs to the concept.

    Built as `SomeMask(SomeMask.Config(...), seed=seed)`. needs_word: whether it looks for what the concept is called;
    see WordMask.
    """

    name: ClassVar[str]
    needs_word: ClassVar[bool] = False

    class Config(Settings):
        """No settings, unless a mask has its own."""

    def __init__(self, config: Any = None, *, seed: int = 0) -> None:
        self.config: Any = config or self.Config()
        self.seed = seed

    @abstractmethod
    def __call__(self, batch: Batch, model: LatentDiffusion | None, words: Sequence[str] | None) -> Tensor:
        """Masks [B, 1, H, W] in [0, 1], on the device of batch.x. words: one per picture. A picture's mask depends on
        its pixels, its key up to `#` and its word alone. Raises ConfigError for what is missing.
        """


class WordMask(MaskProvider):
    """A mask that looks for what the concept is called, with the model's help: a subclass fills `find`."""

    needs_word: ClassVar[bool] = True

    class Config(Settings):
        """The word to look for."""

        word: str | None = Field(
            None, min_length=1, description="What the concept is called; null for the word that learning starts from."
        )

    def __call__(self, batch: Batch, model: LatentDiffusion | None, words: Sequence[str] | None) -> Tensor:
        """As `find`. Raises ConfigError without a model or words."""
        if model is None or words is None:
            missing = "a pipeline" if model is None else "a word for each picture"
            raise ConfigError(f"mask {self.name} looks for a word in the pictures. Give it {missing}.")
        return self.find(batch, model, words)

    @abstractmethod
    def find(self, batch: Batch, model: LatentDiffusion, words: Sequence[str]) -> Tensor:
        """Masks as the contract has them, with what they need at hand."""

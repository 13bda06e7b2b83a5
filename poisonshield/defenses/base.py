"""The Defense contract: change the data before training, the method during it, or both.

What a defense may know of the run comes as a Context; what others must know of a defense it declares below. So nobody
asks which defense it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.diffusion.pipeline import LatentDiffusion


@dataclass(frozen=True)
class Context:
    """What a defense may know of the run, each part absent where there is none: a label needs no run at all.

    num_classes: of a classifier's data. model: the frozen pipeline of a run that learns words, and words, for each of
    its concepts, the word that learning starts from, or None where it starts from numbers.
    """

    seed: int = 0
    num_classes: int | None = None
    model: LatentDiffusion | None = None
    words: tuple[str | None, ...] = ()


class Defense:
    """Both halves default to doing nothing; most defenses fill one. Never told which poison it faces.

    Built as `SomeDefense(config, Context(...))`.
    purifier: whether it changes pixels `x` alone, which suits any training; size and keys stay, and a picture's own
    pixels and key decide what becomes of it.
    once: whether a run has it at most once.
    looks_first: whether `look` has to see a classifier's training pictures before `before` is called.
    """

    name: ClassVar[str]
    purifier: ClassVar[bool] = False
    once: ClassVar[bool] = False
    looks_first: ClassVar[bool] = False

    class Config(Settings):
        """No settings, unless a defense has its own."""

    def __init__(self, config: Any, context: Context | None = None) -> None:
        self.config, self.context = config, context or Context()

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.context.seed

    # The two halves

    def look(self, batches: Iterable[Batch]) -> None:
        """See every training picture once, as the defenses before it leave them, if `looks_first`."""

    def before(self, batch: Batch) -> Batch:
        """The batch with purified pixels `x`, before any augmentation."""
        return batch

    def wrap(self, method: Any) -> Any:
        """The method as it is to be trained. Raises ConfigError for one that it does not suit."""
        return method

    # What it declares

    @property
    def label(self) -> str:
        """How result tables call it."""
        return self.name

    @property
    def exact(self) -> bool:
        """Whether `before` gives the same bits on every device. Not where a network has a part in it."""
        return True

    @property
    def redraws(self) -> bool:
        """Whether `before` draws random numbers anew at every draw, so that a picture is not always the same."""
        return False

    @property
    def ranks_stay_in_step(self) -> bool:
        """Whether every rank runs the method's parts equally often, as sharded weights need."""
        return True

    @property
    def t_range(self) -> tuple[int, int] | None:
        """[first, end) of the diffusion timesteps that it trains on; None where it leaves them alone."""
        return None

    @property
    def wants_masks(self) -> Literal["file", "alpha"] | None:
        """Which masks of the concept have to come with the data; None for none."""
        return None

    @property
    def makes_masks(self) -> bool:
        """Whether it finds out by itself where the concept is."""
        return False

    # What it asks before training, and tells afterwards

    @property
    def surveys(self) -> bool:
        """Whether it has to look at all pictures before training starts: see survey."""
        return False

    def survey(self, batch: Batch, rows: Tensor, prompts: Sequence[str]) -> Any:
        """What it found on the pictures, as plain data that can be kept. batch: all of them, as the defenses before it
        leave them. rows [R, d]: where learning starts. prompts: one for each picture."""
        return None

    def settle(self, found: Any) -> None:
        """Take what a survey found, of this process or of an earlier one."""

    def note(self, given: Batch, made: Batch) -> None:
        """Look at a result of `before` that was kept, in place of making it again."""

    def picture_numbers(self) -> Mapping[str, Mapping[str, float]]:
        """Numbers of the pictures it has seen, by what they say and by picture, such as mask_area."""
        return {}


class Wrapped(SSLMethod):
    """A method around another: encoder, classifier and bookkeeping are the inner one's."""

    def __init__(self, method: SSLMethod) -> None:
        super().__init__()
        self.method = method
        # What a class declares of itself, taken from the inner one: a wrapper has as many views, and is called alike.
        self.num_views, self.default_views = method.num_views, method.default_views
        self.name, self.has_classifier = method.name, method.has_classifier

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """The inner method's encoder."""
        return self.method.encoder

    def projection(self) -> nn.Module | None:
        """The inner method's projector, or None."""
        return self.method.projection()

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """The inner method's features."""
        return self.method.features(batch)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The inner method's loss."""
        return self.method.loss(features, batch)

    def logits(self, x: Tensor) -> Tensor | None:
        """The inner method's class scores."""
        return self.method.logits(x)

    def initialize(self) -> None:
        """Passed on."""
        self.method.initialize()

    def after_step(self, progress: float) -> None:
        """Passed on."""
        self.method.after_step(progress)

    @property
    def acts_after_step(self) -> bool:
        """Whether the inner method does."""
        return self.method.acts_after_step

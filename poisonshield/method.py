"""The Method contract: one training step as one nn.Module, so that any distributed wrapper sees a plain module.

`Method` is what the engine trains. Two kinds add what a defense may stand on: `SSLMethod` trains an encoder of
pictures, `DiffusionMethod` learns words for a frozen diffusion pipeline. Whoever needs to know what a method can do
reads it off these contracts; nobody asks for its class.
"""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from poisonshield.batch import Batch, StepOutput
from poisonshield.errors import ConfigError
from poisonshield.losses.zone import Zone
from poisonshield.models.backbones import Encoder
from poisonshield.models.diffusion.pipeline import LatentDiffusion, Placeholder


class Method(nn.Module):
    """`forward(batch) -> StepOutput` is one step's loss.

    All state lives in parameters and buffers, so a checkpoint of the module is complete. trains_words: whether it is a
    DiffusionMethod.
    """

    name: str
    trains_words: ClassVar[bool] = False

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one step."""

    def initialize(self) -> None:
        """Called once on the method of a new run, and not where weights are loaded: take weights from other files."""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step: moving averages, queues. progress: the share of the run that is done."""

    def parts_to_compile(self) -> tuple[nn.Module, ...]:
        """What the engine puts under torch.compile where `engine.compile` is set; nothing if it has no such part."""
        return ()

    @property
    def acts_after_step(self) -> bool:
        """Whether `after_step` changes anything; the engine then makes sure of a step before it calls it."""
        return type(self).after_step is not Method.after_step


class SSLMethod(Method):
    """A way to train an encoder of pictures, with or without labels.

    The step has two halves so that a defense can stand between them (VESPR reads the same features as the SSL loss):
    `features` runs the encoder once per view, `loss` does the rest.

    num_views, default_views: how many views a step wants, and which augmentation suits it (a name in data/views.py).
    has_classifier: whether `logits` gives class scores.
    """

    num_views: int = 1
    default_views: str = "crop_flip"
    has_classifier: bool = False
    encoder: Encoder

    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one step on a batch with `views`."""
        return self.loss(self.features(batch), batch)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Encoder features of each view, [B, D] each, by the encoder's own `views`; else one by one.

        Batch statistics are those of each view alone. Any module with a feature_dim serves as an encoder.
        """
        one_by_one = lambda views: tuple(self.encoder(v) for v in views)
        return getattr(self.encoder, "views", one_by_one)(batch.all_views())

    @abstractmethod
    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The loss given the features of each view."""

    def logits(self, x: Tensor) -> Tensor | None:
        """Class scores [B, K] of x [B, 3, H, W] in [0, 1], or None for a method without a classifier."""
        return None

    def scores(self, x: Tensor) -> Tensor:
        """`logits`, for whoever cannot do without them. Raises ConfigError for a method without a classifier."""
        found = self.logits(x)
        if found is None:
            raise ConfigError(
                f"{self.name} has no classifier, and class scores are wanted. Use method.name: supervised."
            )
        return found

    def parts_to_compile(self) -> tuple[nn.Module, ...]:
        """The encoder, which is nearly all of the cost, in training and in attacks."""
        return (self.encoder,)

    def projection(self) -> nn.Module | None:
        """What turns features into the z that the loss compares, or None for a method without it."""
        return self._modules.get("projector")


class DiffusionMethod(Method):
    """A way to learn words for a frozen diffusion pipeline.

    Built as `SomeMethod(config, model=model, tokens={concept: placeholder}, seed=seed, samples=samples of a concept in
    a step)`. placeholders: concept -> its place in the vocabulary. vectors: what is learned, all concepts' together.
    zone, t_sampler: where the loss counts and how timesteps are drawn; a defense sets them.
    """

    trains_words = True
    zone: Zone | None = None
    t_sampler: str = "uniform"
    vectors: nn.Parameter
    placeholders: dict[str, Placeholder]

    @classmethod
    def check(cls, config: Any, *, zero_stage: int) -> None:
        """Raise ConfigError for settings that do not work where the optimiser's state is sharded so."""

    @classmethod
    def start_word(cls, config: Any, concept: str | None = None) -> str | None:
        """The word that learning of a concept (None: of any) starts from; None where it starts from numbers."""
        return None

    @property
    @abstractmethod
    def model(self) -> LatentDiffusion:
        """The frozen pipeline."""

    @abstractmethod
    def rows(self, name: str) -> Tensor:
        """The vectors [k, d] of a concept."""

"""The Method contract: one training step as one nn.Module, so that any distributed wrapper sees a plain module."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from poisonshield.batch import Batch, StepOutput


class Method(nn.Module):
    """A way to train an encoder: `forward(batch) -> StepOutput` is one step's loss.

    The step has two halves so that a defense can stand between them (VESPR reads the same features as the SSL loss):
    `features` runs the encoder once per view, `loss` does the rest. All state lives in parameters and buffers,
    so a checkpoint of the module is complete.

    views: how many views a step wants, and which augmentation suits it (a name in data/views.py).
    """

    num_views: ClassVar[int] = 1
    default_views: ClassVar[str] = "crop_flip"
    encoder: nn.Module

    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one step on a batch with `views`."""
        return self.loss(self.features(batch), batch)

    def features(self, batch: Batch) -> tuple[Tensor, ...]:
        """Encoder features of each view, [B, D] each; batch statistics are per view. An encoder may have a way of its own."""
        one_by_one = lambda views: tuple(self.encoder(v) for v in views)
        return getattr(self.encoder, "views", one_by_one)(batch.views)

    @abstractmethod
    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The loss given the features of each view."""

    def logits(self, x: Tensor) -> Tensor | None:
        """Class scores [B, K] of x [B, 3, H, W] in [0, 1], or None for a method without a classifier."""
        return None

    def initialize(self) -> None:
        """Called once on the method of a new run, and not where weights are loaded: take weights from other files."""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step: moving averages, queues. progress: the share of the run that is done, in (0, 1]."""

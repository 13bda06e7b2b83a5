"""Ordinary supervised training: cross-entropy of a linear head. The victim of every availability poison."""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.method import Method
from poisonshield.ops.precision import at_least_float32


class Supervised(Method):
    """Encoder and linear classifier, one augmented view per sample."""

    name: ClassVar[str] = "supervised"

    class Config(Settings):
        """label_smoothing: share of the target spread over all classes."""

        label_smoothing: float = Field(0.0, ge=0, lt=1)

    def __init__(self, config: Config, *, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = nn.Linear(encoder.feature_dim, num_classes)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Mean cross-entropy over all views."""
        per_view = [
            F.cross_entropy(
                at_least_float32(self.head(h)), batch.y, reduction="none", label_smoothing=self.config.label_smoothing
            )
            for h in features
        ]
        loss = collectives.mean(sum(per_view) / len(per_view), batch.rank_sizes)
        return StepOutput(loss, {"ce": loss.detach()})

    def logits(self, x: Tensor) -> Tensor:
        """[B, K]."""
        return self.head(self.encoder(x))

"""Ordinary supervised training: cross-entropy of a linear head. The victim of every availability poison.

From a finished run's encoder it is fine-tuning, and with that encoder frozen a linear probe.
"""

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.errors import ConfigError, DataError
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.weights import Branch, load_encoder
from poisonshield.ops.precision import at_least_float32


class Supervised(SSLMethod):
    """Encoder and linear classifier, one augmented view per sample."""

    name = "supervised"

    has_classifier = True

    class Config(Settings):
        """The loss, and the encoder that training starts from."""

        label_smoothing: float = Field(
            0.0, ge=0, lt=1, description="Share of the target that is spread over all classes, in [0, 1)."
        )
        init_from: str | None = Field(
            None,
            description="A finished run's folder, or its export/method.safetensors or backbone.safetensors; "
            "null starts anew.",
        )
        branch: Branch = Field(
            "online", description="Which of that run's encoders: the online one, or the target that followed it."
        )
        freeze_encoder: bool = Field(
            False, description="Train the head alone; batch statistics and dropout of the encoder stand still."
        )

        @model_validator(mode="after")
        def _encoder_comes_from_somewhere(self) -> "Supervised.Config":
            if self.init_from is None and (self.freeze_encoder or self.branch != "online"):
                setting = "freeze_encoder" if self.freeze_encoder else "branch"
                raise ValueError(f"{setting} needs a trained encoder: set init_from to a finished run's folder.")
            return self

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(
                "supervised training tells classes apart, and the data has one, as images without labels have.\n"
                "  Use a self-supervised method, such as method.name: simclr."
            )
        self.config, self.encoder = config, encoder
        self.head = nn.Linear(encoder.feature_dim, num_classes)
        if config.freeze_encoder:
            encoder.requires_grad_(False)
        # Only now is it known that a frozen encoder stays in evaluation mode.
        self.train()

    def initialize(self) -> None:
        """The encoder of `init_from`."""
        if self.config.init_from is not None:
            load_encoder(self.encoder, self.config.init_from, branch=self.config.branch)

    def train(self, mode: bool = True) -> "Supervised":
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Mean cross-entropy over all views. Raises DataError for samples without labels."""
        if batch.y is None:
            raise DataError(f"{batch.keys[0]} comes without a label, and supervised training needs one of each sample.")
        per_sample = features[0].new_zeros(())
        for h in features:
            scores = at_least_float32(self.head(h))
            per_sample = per_sample + F.cross_entropy(
                scores, batch.y, reduction="none", label_smoothing=self.config.label_smoothing
            )
        loss = collectives.mean(per_sample / len(features), batch.rank_sizes)
        return StepOutput(loss, {"ce": loss.detach()})

    def logits(self, x: Tensor) -> Tensor:
        """Class scores [B, K] of x [B, 3, H, W] in [0, 1]."""
        return self.head(self.encoder(x))

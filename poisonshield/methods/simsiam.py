"""SimSiam: predict the other view's projection, which stands still. No negatives, no second network.
Source: Chen and He 2021.
"""

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.cosine import negative_cosine
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector
from poisonshield.models.predictors import PredictorConfig, build_predictor


class SimSiam(SSLMethod):
    """Negative cosine between predictions and stopped projections. Labels are not used."""

    name = "simsiam"
    num_views = 2
    default_views = "ssl"

    class Config(ProjectorConfig, PredictorConfig):
        """The projector, the predictor, and where the gradient stops."""

        projector: ProjectorName = "simsiam"
        stop_gradient: bool = Field(
            True, description="Whether the loss stops at the targets; false collapses, and is there to be studied."
        )
        symmetrized: bool = Field(True, description="Whether every view predicts, and not the first alone.")

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)
        self.predictor = build_predictor(config, config.out)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Every view predicts the other large views' projections."""
        z = tuple(self.projector(h) for h in features)
        p = self.predictor(z, batch.rank_sizes)
        # Small crops predict and are never predicted.
        targets = tuple(v.detach() if self.config.stop_gradient else v for v in z[: self.num_views])
        loss = negative_cosine(p, targets, symmetrized=self.config.symmetrized, rank_sizes=batch.rank_sizes)
        return StepOutput(loss, {"ssl": loss.detach()})

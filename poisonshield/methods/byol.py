"""BYOL: predict the momentum encoder's view of the same sample, with no negatives. Source: Grill et al. 2020.

The VESPR authors' documented command keeps the moco projector: `projector: moco`.
"""

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.cosine import negative_cosine
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector
from poisonshield.models.predictors import PredictorConfig, build_predictor
from poisonshield.models.target import Momentum, Target, TargetConfig


class BYOL(SSLMethod):
    """Negative cosine between predictions and a momentum encoder's projections. Labels are not used."""

    name = "byol"
    num_views = 2
    default_views = "ssl"

    class Config(ProjectorConfig, PredictorConfig, TargetConfig):
        """The projector, the predictor, the target, and who predicts."""

        projector: ProjectorName = "byol"
        momentum: Momentum = 0.999
        symmetrized: bool = Field(True, description="Whether every view predicts, and not the first alone.")

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)
        self.predictor = build_predictor(config, config.out)
        self.target = Target(config, encoder, self.projector)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Every view predicts what the target makes of the other large views."""
        p = self.predictor(tuple(self.projector(h) for h in features), batch.rank_sizes)
        # Small crops predict and are never predicted.
        targets = tuple(self.target(v) for v in batch.all_views()[: self.num_views])
        loss = negative_cosine(p, targets, symmetrized=self.config.symmetrized, rank_sizes=batch.rank_sizes)
        return StepOutput(loss, {"ssl": loss.detach()})

    def after_step(self, progress: float) -> None:
        """The target follows."""
        self.target.follow(self.encoder, self.projector, progress=progress)

"""MEC: of all agreeing codes, the one of maximum entropy. Source: Liu et al. 2022.

The VESPR authors give no recipe: a predictor and stopped targets are the suggested one, on their mec projector
(simsiam's). Their loss is `terms: 2`, `coding_length: true`, `distortion: 0.06`. The series converges where no
direction holds more than `distortion` of the batch's energy; at 0.06 a small batch near one direction makes its fourth
power explode, and training stands still, hence 0.5.
"""

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.mec import mec
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector
from poisonshield.models.predictors import PredictorConfig, build_predictor


class MEC(SSLMethod):
    """Coding rate of the agreement of predictions and stopped projections. Labels are not used."""

    name = "mec"
    num_views = 2
    default_views = "ssl"

    class Config(ProjectorConfig, PredictorConfig):
        """The projector, the predictor and the coding rate."""

        projector: ProjectorName = "simsiam"
        distortion: float = Field(
            0.5,
            gt=0,
            description="How far codes may lie from the features, in parts of their energy: the paper's epsilon^2 D.",
        )
        terms: int = Field(4, ge=1, description="How many terms of the logarithm's series are summed.")
        coding_length: bool = Field(
            False,
            description="Scale the loss by (B + D) / 2 as the paper does, which makes it some thousand times a cosine; "
            "false scales it by the distortion.",
        )
        stop_gradient: bool = Field(True, description="Whether the loss stops at the targets.")
        symmetrized: bool = Field(True, description="Whether every view predicts, and not the first alone.")

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)
        self.predictor = build_predictor(config, config.out)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Predictions of every view against the other large views' projections."""
        c = self.config
        z = tuple(self.projector(h) for h in features)
        p = self.predictor(z, batch.rank_sizes)
        # Small crops predict and are never predicted.
        targets = tuple(v.detach() if c.stop_gradient else v for v in z[: self.num_views])
        loss = mec(p, targets, distortion=c.distortion, terms=c.terms, coding_length=c.coding_length,
                   symmetrized=c.symmetrized,
                   rank_sizes=batch.rank_sizes)  # fmt: skip
        return StepOutput(loss, {"ssl": loss.detach()})

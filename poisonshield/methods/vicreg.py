"""VICReg: views alike, every feature varied, no two features alike. Source: Bardes, Ponce and LeCun 2022.

`legacy: true` takes the VESPR authors' loss, whose variance terms weigh double.
"""

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.vicreg import vicreg
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector


class VICReg(SSLMethod):
    """Variance, invariance and covariance of projections. Labels are not used."""

    name = "vicreg"
    num_views = 2
    default_views = "ssl"

    class Config(ProjectorConfig):
        """The projector and the weights of the three terms."""

        projector: ProjectorName = "vicreg"
        invariance: float = Field(25.0, ge=0, description="Weight of the distance between two views.")
        variance: float = Field(25.0, ge=0, description="Weight of the deviation that each feature lacks to 1.")
        covariance: float = Field(1.0, ge=0, description="Weight of the squared covariances between features.")
        legacy: bool = Field(False, description="The VESPR authors' form, whose variance terms weigh double.")
        symmetrized: bool = Field(
            False, description="Whether all pairs of views count, and not only those of the first view."
        )

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """The first view against the others, or all pairs where symmetrized."""
        c = self.config
        z = tuple(self.projector(h) for h in features)
        loss = vicreg(z, invariance=c.invariance, variance=c.variance, covariance=c.covariance, legacy=c.legacy,
                      symmetrized=c.symmetrized, rank_sizes=batch.rank_sizes)  # fmt: skip
        return StepOutput(loss, {"ssl": loss.detach()})

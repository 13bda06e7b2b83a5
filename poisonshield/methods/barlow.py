"""Barlow Twins: two views' features correlate one to one. Source: Zbontar et al. 2021.

The VESPR authors give no recipe; projector and weight are the paper's. `legacy: true` takes their loss, which counts
one triangle of the off-diagonal twice.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.barlow import barlow
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector


class Barlow(SSLMethod):
    """Cross-correlation of projections against the identity. Labels are not used."""

    name = "barlow"
    num_views = 2
    default_views = "ssl"

    class Config(ProjectorConfig):
        """The projector and the cross-correlation's settings."""

        projector: ProjectorName = "vicreg"
        off_diagonal: float = Field(0.005, ge=0, description="Weight of the term that makes features independent.")
        scaling: Literal["columns", "rows"] = Field(
            "columns", description="Standardize each feature over the batch, or give each sample length 1."
        )
        hsic: bool = Field(False, description="Aim at -1 beside the diagonal, as HSIC does, in place of 0.")
        legacy: bool = Field(
            False, description="The VESPR authors' form, which counts one triangle twice and the other one not at all."
        )
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
        loss = barlow(z, off_diagonal=c.off_diagonal, scaling=c.scaling, hsic=c.hsic, legacy=c.legacy,
                      symmetrized=c.symmetrized, rank_sizes=batch.rank_sizes)  # fmt: skip
        return StepOutput(loss, {"ssl": loss.detach()})

"""SimCLR: two views of a sample agree, views of different samples do not. Source: Chen et al. 2020.

Projector and temperature are those of the VESPR authors' default (a three-layer head, 0.2).
"""

from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.infonce import InfoNCEConfig, infonce
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, build_projector


class SimCLR(SSLMethod):
    """InfoNCE on a projector's output. Labels are not used."""

    name = "simclr"
    num_views = 2
    default_views = "ssl"

    class Config(InfoNCEConfig, ProjectorConfig):
        """The projector and InfoNCE's settings."""

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """InfoNCE over all views and the global batch."""
        c = self.config
        z = tuple(self.projector(h) for h in features)
        loss = infonce(z, temperature=c.temperature, same_view=c.same_view,
                       negative_weight=c.negative_weight, margin=c.margin,
                       symmetrized=c.symmetrized, rank_sizes=batch.rank_sizes)  # fmt: skip
        return StepOutput(loss, {"ssl": loss.detach()})

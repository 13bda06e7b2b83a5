"""MoCo v3: predictions find their own sample among the momentum encoder's keys. Source: Chen, Xie and He 2021.

`same_view: others` is what the VESPR authors' documented command trains; the paper's loss is "none", the default here.
Small crops ask and are never keys.
"""

from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.infonce import InfoNCEConfig, SameView, infonce
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, build_projector
from poisonshield.models.predictors import PredictorConfig, build_predictor
from poisonshield.models.target import Target, TargetConfig


class MoCo(SSLMethod):
    """InfoNCE between predictions and a momentum encoder's projections. Labels are not used."""

    name = "moco"
    num_views = 2
    default_views = "ssl"

    class Config(InfoNCEConfig, ProjectorConfig, PredictorConfig, TargetConfig):
        """The projector, predictor, target and InfoNCE's settings."""

        same_view: SameView = "none"

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)
        self.predictor = build_predictor(config, config.out)
        self.target = Target(config, encoder, self.projector)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """InfoNCE of every view's prediction against the large views' keys."""
        c = self.config
        p = self.predictor(tuple(self.projector(h) for h in features), batch.rank_sizes)
        keys = tuple(self.target(v) for v in batch.all_views()[: self.num_views])
        loss = infonce(p, keys, temperature=c.temperature, same_view=c.same_view,
                       negative_weight=c.negative_weight, margin=c.margin,
                       symmetrized=c.symmetrized, rank_sizes=batch.rank_sizes)  # fmt: skip
        return StepOutput(loss, {"ssl": loss.detach()})

    def after_step(self, progress: float) -> None:
        """The target follows."""
        self.target.follow(self.encoder, self.projector, progress=progress)

"""SimCLR: two views of a sample agree, views of different samples do not. Source: Chen et al. 2020.

Projector and temperature are those of the VESPR authors' default (a three-layer head, 0.2).
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.losses.infonce import infonce
from poisonshield.method import Method
from poisonshield.models.heads import projector


class SimCLR(Method):
    """NT-Xent on a projector's output. Labels are not used."""

    name: ClassVar[str] = "simclr"
    num_views: ClassVar[int] = 2
    default_views: ClassVar[str] = "ssl"

    class Config(Settings):
        """temperature of the similarities; hidden and out: the projector's widths."""

        temperature: float = Field(0.2, gt=0)
        hidden: int = Field(2048, gt=0)
        out: int = Field(2048, gt=0)

    def __init__(self, config: Config, *, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = projector(encoder.feature_dim, hidden=config.hidden, out=config.out)

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """NT-Xent over all views and the global batch."""
        z = tuple(self.projector(h) for h in features)
        loss = infonce(z, temperature=self.config.temperature, rank_sizes=batch.rank_sizes)
        return StepOutput(loss, {"ssl": loss.detach()})

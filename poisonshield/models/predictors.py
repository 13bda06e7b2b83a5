"""Which predictor a method puts on its projections: a learned one, or the optimal one in closed form."""

from pydantic import Field
from torch import nn

from poisonshield.config import Settings
from poisonshield.models.directset import DirectSet
from poisonshield.models.heads import Predictor


class PredictorConfig(Settings):
    """predictor: hidden width of the learned one. directset: exponent of the optimal predictor, which then replaces it.

    directset_offset, _momentum, _every: its regulariser, averaging, and how many steps share one eigendecomposition.
    """

    predictor: int = Field(512, gt=0)
    directset: float | None = Field(None, gt=0)
    directset_offset: float = Field(0.3, ge=0)
    directset_momentum: float = Field(0.5, ge=0, lt=1)
    directset_every: int = Field(1, ge=1)


def build_predictor(config: PredictorConfig, width: int) -> nn.Module:
    """Called with all views' projections [B, width] and the batch's rank_sizes; returns as many views."""
    if config.directset is None:
        return Predictor(width, config.predictor)
    return DirectSet(
        width,
        exponent=config.directset,
        offset=config.directset_offset,
        momentum=config.directset_momentum,
        every=config.directset_every,
    )

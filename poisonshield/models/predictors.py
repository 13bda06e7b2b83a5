"""Which predictor a method puts on its projections: a learned one, or the optimal one in closed form."""

from pydantic import Field
from torch import nn

from poisonshield.config import Settings
from poisonshield.models.directset import DirectSet
from poisonshield.models.heads import Predictor


class PredictorConfig(Settings):
    """The predictor: a learned one, or the one in closed form where `directset` is set."""

    predictor: int = Field(512, gt=0, description="Hidden width of the learned predictor.")
    directset: float | None = Field(
        None,
        gt=0,
        description="Exponent of the predictor in closed form, which replaces the learned one; 0.5 works, 1 collapses, "
        "null keeps the learned one.",
    )
    directset_offset: float = Field(
        0.3, ge=0, description="Multiple of the identity that is added to the predictor in closed form."
    )
    directset_momentum: float = Field(
        0.5, ge=0, lt=1, description="Share of the averaged correlation that is kept at each step."
    )
    directset_every: int = Field(1, ge=1, description="How many steps share one eigendecomposition.")


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

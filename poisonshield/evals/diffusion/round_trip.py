"""What the pipeline's VAE does to the concept's own pictures, which no learned word can undo."""

from typing import Any

from torch import Tensor

from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import round_trip


class RoundTrip(WordEvaluation):
    """What the VAE changes in the concept's clean pictures."""

    name = "round_trip"
    numbers = (Number("round_trip_error", "mean square change by the VAE", better="lower", digits=5),)

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """Mean over the clean pictures."""
        return {"round_trip_error": float(round_trip_error(subject.model, subject.clean).mean())}


def round_trip_error(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Mean square change [N] of pictures through the VAE and back. Larger for poisoned pictures than for clean ones."""
    return (round_trip(model, x) - x).square().flatten(1).mean(1)

"""Local Lipschitz constant of an encoder: how far a small change of pixels can move its features, per unit of change.

    L(x) = max over |x' - x|_inf <= eps of  |f(x) - f(x')|_1 / |x - x'|_inf

found by sign ascent on the ratio itself (its denominator has a gradient too), so what comes out is a lower bound.
Pixel units: a model that normalizes its input does so inside f. Source: the VESPR authors' evaluation, after
Yang et al. 2020, 2003.02460; theirs works on normalized pixels and takes the best of the last points only.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch
from poisonshield.config import Pixels, Settings
from poisonshield.errors import DataError
from poisonshield.evals.base import Evaluation, Number, Subject

SMALLEST = 1e-6  # distances are taken to be at least this, so that x' = x has a ratio of 0


class Lipschitz(Evaluation[Subject]):
    """How far a small change of pixels can move the features of test images."""

    name = "lipschitz"
    on = False
    numbers = (
        Number("lipschitz_raw", "local Lipschitz constant", better="lower"),
        Number("lipschitz_unit", "found by ascent", better="lower", panel="local Lipschitz, unit features"),
    )

    class Config(Settings):
        """The ascent. A sample costs about 4 * steps * restarts forward passes."""

        samples: int | None = Field(500, ge=1, description="Test images, drawn with the run's seed; null for all.")
        eps: Pixels = Field(4 / 255, description="Largest change of a pixel.")
        step_size: Pixels = Field(0.6 / 255, description="Change of a pixel in one step.")
        steps: int = Field(10, ge=0, description="Steps of one ascent.")
        restarts: int = Field(5, ge=1, description="Ascents from different random starts; the best counts.")

    def lacks(self, subject: Subject) -> str | None:
        """Test images."""
        return subject.without_test()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Of the features as they are, and of l2-normalized ones."""
        settings = self.config.model_dump()
        count = settings.pop("samples")
        found = {
            key: local_lipschitz(
                subject.method.encoder,
                subject.samples.test(count),
                normalize=normalize,
                seed=subject.seed,
                **settings,
            )
            for key, normalize in (("lipschitz_raw", False), ("lipschitz_unit", True))
        }
        return dict(found)


def local_lipschitz(
    encoder: nn.Module,
    batches: Iterable[Batch],
    *,
    eps: float = 4 / 255,
    steps: int = 10,
    step_size: float = 0.6 / 255,
    restarts: int = 5,
    normalize: bool = False,
    seed: int = 0,
) -> float:
    """Mean over samples of the largest ratio seen at any point of any restart. normalize: of l2-normalized features.

    Depends on (seed, epoch, key) of each sample, not on batches; the encoder's weights, statistics and mode stay.
    Costs about 2 * steps * restarts forward passes a sample.
    """
    attack, budget = PGD(steps=steps, step_size=step_size, restarts=restarts), Linf(eps)
    found = []
    with frozen_stats(encoder):
        for batch in batches:
            pixels = batch.pixels()
            with torch.no_grad():
                h = _features(encoder, pixels, normalize)
            best = h.new_zeros(len(batch))

            def objective(v: Tensor, x: Tensor = pixels, h: Tensor = h, best: Tensor = best) -> Tensor:
                value = ratio(h, _features(encoder, v, normalize), x, v)
                torch.maximum(best, value.detach(), out=best)
                return value

            x_adv = attack(objective, pixels, budget, batch.random(seed, pixels.device).within("lipschitz"))
            with torch.no_grad():
                objective(x_adv)  # the last point; the attack itself looks at it only to compare restarts
            found.append(best.double())
    if not found:
        raise DataError("there are no samples to measure a Lipschitz constant of.")
    return float(torch.cat(found).mean())


def ratio(h: Tensor, other_h: Tensor, x: Tensor, other_x: Tensor) -> Tensor:
    """|h - other_h|_1 / |x - other_x|_inf of each sample, [B]; h [B, D], x [B, 3, H, W]. Differentiable."""
    moved = (h - other_h).abs().sum(1)
    return moved / (x - other_x).abs().flatten(1).amax(1).clamp(min=SMALLEST)


def _features(encoder: nn.Module, x: Tensor, normalize: bool) -> Tensor:
    h = encoder(x.contiguous(memory_format=torch.channels_last)).float()
    return F.normalize(h, dim=1) if normalize else h

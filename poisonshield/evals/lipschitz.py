"""Local Lipschitz constant of an encoder: how far a small change of pixels can move its features, per unit of change.

    L(x) = max over |x' - x|_inf <= eps of  |f(x) - f(x')|_1 / |x - x'|_inf

found by sign ascent on the ratio itself (its denominator has a gradient too), so what comes out is a lower bound.
Pixel units: a model that normalises its input does so inside f. Source: the VESPR authors' evaluation, after
Yang et al. 2020, 2003.02460; theirs works on normalised pixels and takes the best of the last points only.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch

SMALLEST = 1e-6  # distances are taken to be at least this, so that x' = x has a ratio of 0


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
    """Mean over samples of the largest ratio seen at any point of any restart. normalize: of l2-normalised features.

    Depends on (seed, epoch, key) of each sample, not on batches; the encoder's weights, statistics and mode stay.
    Costs about 2 * steps * restarts forward passes a sample.
    """
    attack, budget = PGD(steps=steps, step_size=step_size, restarts=restarts), Linf(eps)
    found = []
    with frozen_stats(encoder):
        for batch in batches:
            with torch.no_grad():
                h = _features(encoder, batch.x, normalize)
            best = h.new_zeros(len(batch))

            def objective(v: Tensor, x: Tensor = batch.x, h: Tensor = h, best: Tensor = best) -> Tensor:
                value = ratio(h, _features(encoder, v, normalize), x, v)
                torch.maximum(best, value.detach(), out=best)
                return value

            x_adv = attack(objective, batch.x, budget, batch.random(seed, batch.x.device).within("lipschitz"))
            with torch.no_grad():
                objective(x_adv)  # the last point; the attack itself looks at it only to compare restarts
            found.append(best.double())
    return float(torch.cat(found).mean())


def ratio(h: Tensor, other_h: Tensor, x: Tensor, other_x: Tensor) -> Tensor:
    """|h - other_h|_1 / |x - other_x|_inf of each sample, [B]; h [B, D], x [B, 3, H, W]. Differentiable."""
    moved = (h - other_h).abs().sum(1)
    return moved / (x - other_x).abs().flatten(1).amax(1).clamp(min=SMALLEST)


def _features(encoder: nn.Module, x: Tensor, normalize: bool) -> Tensor:
    h = encoder(x.contiguous(memory_format=torch.channels_last)).float()
    return F.normalize(h, dim=1) if normalize else h

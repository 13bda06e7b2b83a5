"""Distances of the set of generated pictures from real ones of the concept, beside their ceiling.

A set's distance has no meaning by itself: real pictures that went through the pipeline's VAE are the best it can draw,
so their distance is given as `ceiling` beside it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import round_trip


class Distances(WordEvaluation):
    """How far the set of pictures lies from real ones, in features and in colours."""

    name = "distances"
    place = 20
    numbers = (
        Number("feature_distance", "feature distance", better="lower", column="always"),
        Number("color_distance", "colour distance", better="lower", column="always"),
        Number("feature_ceiling", "feature distance of real pictures through the VAE", better="lower"),
        Number("color_ceiling", "colour distance of real pictures through the VAE", better="lower"),
    )

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """See set_distances; None for fewer than 4 references or 2 pictures."""
        if len(subject.references) < 4 or len(subject.x) < 2:
            return {number.key: None for number in self.numbers}
        return dict(set_distances(subject.x, subject.references, judge=subject.judge, model=subject.model))


class Features(Protocol):
    """Something that has features of pictures, such as the judge of the rendered world."""

    def features(self, x: Tensor) -> Tensor:
        """[N, D] of pictures [N, 3, H, W]."""


def color_distance(x: Tensor, references: Tensor, *, bins: int = 4) -> float:
    """Total variation in [0, 1] between the joint RGB histograms of two sets of pictures, `bins` a channel.

    Sizes may differ. 0: the same share of every colour; 1: no colour in common.
    """
    return float((_histogram(x, bins) - _histogram(references, bins)).abs().sum() / 2)


def energy_coefficient(h: Tensor, g: Tensor) -> float:
    """How far two samples h [N, D], g [M, D] are from one distribution: about 0 if they share it, 1 if far apart.

    (2 E|h-g| - E|h-h'| - E|g-g'|) / 2 E|h-g| with unbiased means, so it may fall a little below 0, and sets of
    different sizes compare. Needs two rows each. Source: Szekely and Rizzo 2013.
    """
    if min(len(h), len(g)) < 2 or h.shape[1:] != g.shape[1:]:
        raise ShapeError(f"features {tuple(h.shape)} and {tuple(g.shape)}: two rows at least of one width are wanted.")
    h, g = h.double(), g.double()
    between = torch.cdist(h, g).mean()
    within = sum(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (h, g))
    return float((2 * between - within) / (2 * between).clamp(min=1e-12))


@torch.no_grad()
def set_distances(
    x: Tensor, references: Tensor, *, judge: Features | None = None, model: LatentDiffusion | None = None
) -> dict[str, float | None]:
    """Distances of generated pictures x [N, 3, H, W] from real ones [M, 3, H, W] in [0, 1]; lower is nearer.

    color_distance, and feature_distance by energy_coefficient of the judge's features (None without a judge); and each
    again as *_ceiling for the second half of the references through the model's VAE (None without a model). All are
    taken against the first half of the references. Raises ShapeError for fewer than 4 references or 2 pictures.
    """
    if len(references) < 4 or len(x) < 2:
        raise ShapeError(f"{len(x)} pictures and {len(references)} references; at least 2 and 4 are wanted.")
    real, rest = references[: len(references) // 2], references[len(references) // 2 :]
    best = None if model is None else round_trip(model, rest)
    out: dict[str, float | None] = {"color_distance": color_distance(x, real), "feature_distance": None}
    out |= {"color_ceiling": None if best is None else color_distance(best, real), "feature_ceiling": None}
    if judge is not None:
        h = judge.features(real)
        out["feature_distance"] = energy_coefficient(judge.features(x), h)
        out["feature_ceiling"] = None if best is None else energy_coefficient(judge.features(best), h)
    return out


def _histogram(x: Tensor, bins: int) -> Tensor:
    """Shares [bins^3] of the pixels of a whole set, float64."""
    cells = (x.clamp(0, 1) * bins).long().clamp(max=bins - 1)  # [N, 3, H, W]
    index = (cells[:, 0] * bins + cells[:, 1]) * bins + cells[:, 2]
    return torch.bincount(index.flatten(), minlength=bins**3).double() / index.numel()

"""How two views of the same samples lie to each other: a and b [n, D], row i of both from sample i.

Rows are l2-normalized here, on copies: inputs stay as they are. All in float64. Pairs are visited in blocks of rows,
so memory grows with n and not with n squared; time grows with n squared.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.config import Settings
from poisonshield.errors import ShapeError
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import extract

_BLOCK = 1024


class Alignment(Evaluation[Subject]):
    """How two views of the same training samples lie to each other."""

    name = "alignment"
    numbers = (
        Number("positive_cosine", "two views", better="higher", panel="cosine"),
        Number("negative_cosine", "other samples", better="lower", panel="cosine"),
        Number("positive_concentration", "concentration of two views", better="higher", digits=3),
        Number("negative_concentration", "concentration of other samples", better="lower", digits=3),
        Number("variance", "variance of features", better="higher", digits=4),
        Number("correlation_strength", "correlation of features", better="lower", digits=4),
        Number("mutual_information", "information that views share, nats", better="higher"),
        Number("eigen_alignment", "cosine of eigenvectors", better="higher"),
        Number("aligned_samples", "samples with two views", digits=0),
    )

    class Config(Settings):
        """Which samples."""

        samples: int | None = Field(
            1000, ge=2, description="Training samples, drawn with the run's seed; null for all."
        )

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Of two views as the method augments them."""
        views = [subject.samples.augmented(self.config.samples, view=i) for i in (0, 1)]
        a, b = (extract(subject.method.encoder, view).h for view in views)
        return alignment(a, b) | {"aligned_samples": len(a)}


@torch.no_grad()
def alignment(a: Tensor, b: Tensor) -> dict[str, float]:
    """Every measure of this file by name; `variance` and `correlation_strength` are those of a.

    Raises ShapeError unless a and b have the same shape [n, D] with n > 1.
    """
    if a.dim() != 2 or a.shape != b.shape or len(a) < 2:
        raise ShapeError(f"views of shape {tuple(a.shape)} and {tuple(b.shape)}: two of [n, D] with n > 1 are wanted.")
    positive, negative = cosines(a, b)
    near, far = concentration(a, b)
    return {
        "positive_cosine": positive,
        "negative_cosine": negative,
        "positive_concentration": near,
        "negative_concentration": far,
        "variance": variance(a),
        "correlation_strength": correlation_strength(a),
        "mutual_information": mutual_information(a, b),
        "eigen_alignment": eigen_alignment(a, b),
    }


def cosines(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean cosine between views of one sample, and between view a of one sample and view b of another (i != k)."""
    return _means(a, b, lambda cosine: cosine)


def concentration(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of exp(4 cos - 4), which is exp(-2 |a - b|^2) on the sphere, of the same pairs as `cosines`.

    The second is the Gaussian potential of Wang and Isola 2020 (2005.10242): small where features are spread out.
    """
    return _means(a, b, lambda cosine: (4 * cosine - 4).exp())


def variance(h: Tensor) -> float:
    """Mean over columns of the variance (over n) of normalized rows: 1/D at most, 0 for a collapsed encoder."""
    return float(_unit(h).var(0, correction=0).mean())


def correlation_strength(h: Tensor) -> float:
    """Mean absolute off-diagonal element of R^T R / n, R the normalized rows: 0 where columns are uncorrelated."""
    matrix = _correlation(h)
    off = matrix.abs().sum() - matrix.diagonal().abs().sum()
    return float(off / max(1, matrix.numel() - len(matrix)))


def mutual_information(a: Tensor, b: Tensor) -> float:
    """A lower bound, in nats, of the information that the views share: log(2n - 1) - NT-Xent at temperature 1.

    Each of the 2n rows finds its partner among the 2n - 1 others, and has no place in that sum itself: the VESPR
    authors' probe keeps exp(0) for it, which is one term too many for log(2n - 1). Compare at equal n only. Cosines at
    temperature 1 make it loose: never more than 2. Source: van den Oord et al. 2018, 1807.03748, section 2.3.
    """
    rows = torch.cat([_unit(a), _unit(b)])  # [2n, D]
    partner = (rows * rows.roll(len(a), 0)).sum(1)
    total = 0.0
    for start, block in _blocks(rows):
        cosine = block @ rows.T
        own = torch.arange(len(block), device=rows.device)
        cosine[own, start + own] = -math.inf
        total += float((cosine.logsumexp(1) - partner[start : start + len(block)]).sum())
    return math.log(len(rows) - 1) - total / len(rows)


def eigen_alignment(p: Tensor, z: Tensor, *, top: int = 512) -> float:
    """Mean cosine between C_p v and v over the `top` leading eigenvectors v of C_z; 1 if both have the same ones.

    C is R^T R / n of normalized rows. p and z may be a predictor's output and its target, or the two views. Directions
    that z does not use (eigenvalue shares up to 1.19e-7) are left out: their eigenvectors are arbitrary.
    Source: Tian et al. 2021, 2102.06810 (eigenspace alignment).
    """
    values, vectors = torch.linalg.eigh(_correlation(z))  # smallest first
    used = int((values > torch.finfo(torch.float32).eps * values.sum()).sum())
    v = vectors.flip(1)[:, : min(top, used)]  # [D, top]
    return float(F.cosine_similarity(_correlation(p) @ v, v, dim=0).mean())


def _unit(h: Tensor) -> Tensor:
    return F.normalize(h.double(), dim=1)


def _correlation(h: Tensor) -> Tensor:
    rows = _unit(h)
    return rows.T @ rows / len(rows)


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), _BLOCK):
        yield start, rows[start : start + _BLOCK]


def _means(a: Tensor, b: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean of of(cosine) over pairs (i, i), and over pairs (i, k) with i != k."""
    a, b = _unit(a), _unit(b)
    same = float(of((a * b).sum(1)).sum())
    everything = sum(float(of(block @ b.T).sum()) for _, block in _blocks(a))
    return same / len(a), (everything - same) / (len(a) * (len(a) - 1))

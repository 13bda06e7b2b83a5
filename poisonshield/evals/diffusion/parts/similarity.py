"""How alike two sets of features are."""

import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ShapeError


def cosine(h: Tensor, g: Tensor) -> float:
    """Mean cosine in [-1, 1] over all pairs of rows of h [N, D] and g [M, D]. Raises ShapeError for an empty set."""
    if h.dim() != 2 or g.dim() != 2 or h.shape[1] != g.shape[1] or not len(h) or not len(g):
        raise ShapeError(
            f"features {tuple(h.shape)} and {tuple(g.shape)}: [N, D] and [M, D] without empty sets are wanted."
        )
    return float((F.normalize(h.double(), dim=1).mean(0) * F.normalize(g.double(), dim=1).mean(0)).sum())

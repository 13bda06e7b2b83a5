"""Pairs of views, (online view i, target view j), that a self-supervised loss sums over, and all ranks' rows of a view.

Online views may outnumber target views (multi-crop: small crops ask, large ones answer); a view never asks itself.
"""

import torch
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import ShapeError
from poisonshield.ops.check import check_tensor
from poisonshield.ops.precision import at_least_float32

Views = tuple[Tensor, ...]
"""One [B, D] per view."""


def pairs(online: Views, target: Views, *, symmetrized: bool = True) -> list[tuple[int, int]]:
    """(i, j) with i != j; only i = 0 asks where not symmetrized. The losses average over these pairs.

    Raises TypeError for anything but tensors, ShapeError for fewer than two views, more target than online views, or
    shapes that differ.
    """
    for view in (*online, *target):
        check_tensor("a view", view, "a tensor [B, D] for each view")
    if len(online) < 2 or not 1 <= len(target) <= len(online):
        raise ShapeError(
            f"the loss got {len(online)} online and {len(target)} target views; it needs at least two online views, "
            "and target views for the first of them."
        )
    if collectives.world_size() == 1 and 0 in online[0].shape:  # a rank may have nothing where others have something
        raise ShapeError(f"the loss got views of shape {tuple(online[0].shape)}, which hold nothing to compare.")
    if any(t.shape != online[0].shape or t.dim() != 2 for t in (*online, *target)):
        shapes = [tuple(t.shape) for t in (*online, *target)]
        raise ShapeError(f"the loss got views of shapes {shapes}; it needs all of them [B, D] alike.")
    asking = range(len(online)) if symmetrized else range(1)
    return [(i, j) for i in asking for j in range(len(target)) if j != i]


def check_samples(views: Views, least: int, loss: str) -> None:
    """Raises ShapeError where the global batch has fewer samples than a loss has a value for. views: as gathered."""
    if views[0].shape[0] < least:
        raise ShapeError(f"{loss} got {views[0].shape[0]} samples and compares {least} or more. Give a larger batch.")


def gather_views(views: Views, rank_sizes: tuple[int, ...] | None) -> Views:
    """Each view's rows of all ranks, [global B, D], float32 at least, with gradient; one message for all views."""
    wide = tuple(at_least_float32(v) for v in views)
    if collectives.world_size() == 1:
        return wide
    # Side by side: views have the same rows, and one message is cheaper than one each.
    return collectives.gather(torch.cat(wide, dim=1), rank_sizes).chunk(len(wide), dim=1)

"""Difference of logits ratio: how far the true class is from the top, whatever the scores' scale. Croce and Hein 2020.

    untargeted   - (z_y - max_{k != y} z_k) / (z_1st - z_3rd)
    targeted     - (z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2)          z_1st >= z_2nd >= ...: the scores in order

Positive where the sample is misclassified. Unlike cross-entropy's, its gradient does not vanish where a network is
very sure of itself, so attacks that ascend it are not fooled by large scores. Nobody trains with it.
"""

import torch
from torch import Tensor

from poisonshield.errors import DataError, ShapeError
from poisonshield.ops.check import check_device, check_tensor, kind, readable
from poisonshield.ops.precision import at_least_float32, outside_autocast

_SMALLEST = 1e-12  # equal scores give 0, not NaN


@outside_autocast
def dlr(scores: Tensor, y: Tensor, *, target: Tensor | None = None) -> Tensor:
    """The loss of each sample, [B]; scores [B, K], labels y and target (the class to be taken for) int64 [B].

    K is at least 3, with a target 4. Raises ShapeError for fewer classes, DataError for labels outside them.
    """
    check_tensor("scores", scores, "a tensor [B, K]")
    wanted = 3 if target is None else 4
    if scores.dim() != 2 or scores.shape[1] < wanted:
        raise ShapeError(
            f"scores have shape {tuple(scores.shape)}. This loss compares at least {wanted} classes, [B, K]."
        )
    _check_labels(scores, y, "y")
    if target is not None:
        _check_labels(scores, target, "target")
    scores = at_least_float32(scores)
    own = scores.gather(1, y[:, None])[:, 0]
    ordered = scores.sort(dim=1, descending=True).values
    if target is not None:
        margin = own - scores.gather(1, target[:, None])[:, 0]
        return -margin / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + _SMALLEST)
    others = scores.scatter(1, y[:, None], -float("inf")).amax(1)
    return -(own - others) / (ordered[:, 0] - ordered[:, 2] + _SMALLEST)


def _check_labels(scores: Tensor, y: Tensor, name: str) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != scores.shape[:1]:
        raise ShapeError(f"{name} is {kind(y)}. Give int64 [{scores.shape[0]}], a class of each sample.")
    check_device(scores, y, name, owner="scores")
    if readable(y) and y.shape[0]:
        first, last = (int(v) for v in y.aminmax())
        if first < 0 or last >= scores.shape[1]:
            raise DataError(f"{name} reaches from {first} to {last}; there are scores of {scores.shape[1]} classes.")

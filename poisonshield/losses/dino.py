"""DINO: the student's softmax matches the centred, sharpened softmax of the teacher. Source: Caron et al. 2021.

    L = - 1 / pairs sum_{i, j != i} mean_n softmax((m_j[n] - centre) / teacher_t) . log_softmax(p_i[n] / student_t)
    centre <- momentum centre + (1 - momentum) mean of the teacher's outputs over all target views and the global batch

The loss reads a centre and never moves it: only the training step does, so that an attack that evaluates the loss
leaves it alone. No sample meets another one, so nothing is gathered; the centre's mean is summed over ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield import collectives
from poisonshield.errors import ShapeError
from poisonshield.losses.pairs import Views, pairs
from poisonshield.ops.check import check_number
from poisonshield.ops.precision import at_least_float32, outside_autocast


@outside_autocast
def dino(
    online: Views,
    target: Views,
    centre: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.05,
    symmetrized: bool = True,
    rank_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """A scalar; online and target one [B, D] per view, centre [D].

    Nothing is stopped here: detach the target, or have it made without gradient.
    """
    check_number("student_temperature", student_temperature, above=0)
    check_number("teacher_temperature", teacher_temperature, above=0)
    view_pairs = pairs(online, target, symmetrized=symmetrized)
    _check_centre(centre, target)
    teacher = [F.softmax((at_least_float32(m) - centre) / teacher_temperature, dim=1) for m in target]
    student = [F.log_softmax(at_least_float32(p) / student_temperature, dim=1) for p in online]
    agreement = sum(((teacher[j] * student[i]).sum(1) for i, j in view_pairs), start=student[0].new_zeros(()))  # [B]
    return -collectives.mean(agreement, rank_sizes) / len(view_pairs)


def _check_centre(centre: Tensor, target: Views) -> None:
    if centre.shape != target[0].shape[1:]:
        raise ShapeError(
            f"the centre has shape {tuple(centre.shape)} and the teacher {tuple(target[0].shape)}. "
            f"Give a centre {list(target[0].shape[1:])}."
        )


@torch.no_grad()
def move_centre(
    centre: Tensor, target: Views, *, momentum: float = 0.9, rank_sizes: tuple[int, ...] | None = None
) -> Tensor:
    """The centre [D] after one step; equal on all ranks."""
    check_number("momentum", momentum, least=0, most=1)
    _check_centre(centre, target)
    outputs = [at_least_float32(m) for m in target]
    per_sample = sum(outputs, start=outputs[0].new_zeros(())) / len(target)  # [B, D]
    total = sum(rank_sizes) if rank_sizes else len(per_sample) * collectives.world_size()
    mean = collectives.all_reduce_sum(per_sample.sum(0)) / total
    return momentum * centre + (1 - momentum) * mean.to(centre.dtype)

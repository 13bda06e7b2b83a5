"""A warm start for attacks: what earlier attacks found, averaged for each class and view.

A planted shortcut is the same for all images of a class, so part of what erases it is too. Kept at 32 x 32 pixels per
class whatever the views' size, since crops of different places cannot remember more than that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.attacks.parts.budgets import Budget

_SIDE = 32


class ClassMemory(nn.Module):
    """A buffer, part of the checkpoint, seen as `average` [views, classes, 3, 32, 32]. `keep` stays of it at each step.

    It lies flat, since torch fails to move a module with a buffer of five dimensions to channels-last memory.
    """

    flat: Tensor

    def __init__(self, num_classes: int, num_views: int, *, keep: float = 0.9) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("flat", torch.zeros(num_views, num_classes, 3 * _SIDE * _SIDE))

    @property
    def average(self) -> Tensor:
        """The memory itself, not a copy."""
        return self.flat.unflatten(2, (3, _SIDE, _SIDE))

    def start(self, view: int, x: Tensor, y: Tensor, budget: Budget) -> Tensor:
        """x [B, 3, H, W] moved by its class's average, inside the budget and [0, 1]."""
        delta = F.interpolate(self.average[view][y], x.shape[2:], mode="bilinear", antialias=True)
        x_adv = x.clone().add_(delta)  # in x's memory layout, which is channels last for training views
        return budget.project_(x_adv, x)

    @torch.no_grad()
    def remember(self, view: int, delta: Tensor, y: Tensor) -> None:
        """Take in one step's perturbations [B, 3, H, W] of classes y [B], over all ranks."""
        small = F.interpolate(delta.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True)
        total = torch.zeros_like(self.average[view]).index_add_(0, y, small)
        count = torch.bincount(y, minlength=len(total)).to(total)
        both = collectives.all_reduce_sum(torch.cat([total.flatten(), count]))
        total, count = both[: -len(count)].view_as(total), both[-len(count) :].view(-1, 1, 1, 1)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.average[view])
        self.average[view].lerp_(mean, 1 - self.keep)

"""CutMix: a rectangle of every training view is another sample's, and so much of its label. Source: Yun et al. 2019."""

from typing import ClassVar

import torch
from torch import Tensor

from poisonshield.defenses.parts.mixing import Mixing, MixingConfig, MixingMethod
from poisonshield.random import KeyedRandom


class CutMixMethod(MixingMethod):
    """A rectangle of the view's shape with an area of 1 - share, at a uniform centre, cut off at the edges."""

    def mix(self, view: Tensor, other: Tensor, share: Tensor, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
        """The view with the rectangle [B, 3, H, W]; the share is what is left of its own pixels, counted."""
        height, width = view.shape[2:]
        u, side = rng.uniform("centre", 2), (1 - share).sqrt()
        rows, columns = (_between(u[:, i], side, n) for i, n in enumerate((height, width)))
        inside = rows[:, :, None] & columns[:, None, :]  # [B, H, W]
        own = 1 - inside.flatten(1).sum(1) / (height * width)
        return torch.where(inside[:, None], other, view), own


def _between(u: Tensor, side: Tensor, length: int) -> Tensor:
    """Which of `length` places lie within a stretch of floor(side * length) around floor(u * length), bool [B, n]."""
    cut = (side * length).long()
    first = ((u * length).long() - cut // 2).clamp(0, length)
    last = ((u * length).long() + cut // 2).clamp(0, length)
    places = torch.arange(length, device=u.device)
    return (places >= first[:, None]) & (places < last[:, None])


class CutMix(Mixing):
    """Puts a rectangle of another sample into each view, its area drawn from Beta(1, 1), labels by area."""

    name: ClassVar[str] = "cutmix"
    method: ClassVar[type[MixingMethod]] = CutMixMethod

    class Config(MixingConfig):
        """Which samples are mixed."""

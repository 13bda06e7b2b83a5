"""Cutout: a black square on every training view, at a place of its own. Source: DeVries and Taylor 2017.

A shortcut that sits in few pixels is often covered; one that is spread over the picture is not.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.defenses.parts.views import ChangedViews
from poisonshield.method import SSLMethod
from poisonshield.random import KeyedRandom


class Cutout(Defense):
    """Blackens a square of every view, after all augmentation."""

    name: ClassVar[str] = "cutout"

    class Config(Settings):
        """The square."""

        size: int | None = Field(
            None, ge=1, description="side of the square in pixels; null is half the view's shorter side, 16 of 32"
        )

    def wrap(self, method: SSLMethod) -> SSLMethod:
        """Any method of views."""
        return CutoutMethod(method, self.config, self.seed)


class CutoutMethod(ChangedViews):
    """The inner method on views with a black square each."""

    def __init__(self, method: SSLMethod, config: Cutout.Config, seed: int) -> None:
        super().__init__(method, seed)
        self.config = config

    def change(self, view: Tensor, rng: KeyedRandom) -> Tensor:
        """The centre is uniform over the pixels, so a part of the square may lie outside."""
        height, width = view.shape[2:]
        size = self.config.size or min(height, width) // 2
        u = rng.uniform("centre", 2)
        rows, columns = (_inside(u[:, i], n, size) for i, n in enumerate((height, width)))
        return view.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _inside(u: Tensor, length: int, size: int) -> Tensor:
    """Which of `length` places lie in a stretch of `size` around the centre floor(u * length), bool [B, length]."""
    first = (u * length).long()[:, None] - size // 2
    places = torch.arange(length, device=u.device)
    return (places >= first) & (places < first + size)

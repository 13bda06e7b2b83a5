"""Mixup: every training view is a blend of two samples, and its label a blend of theirs. Source: Zhang et al. 2018."""

from typing import ClassVar

from torch import Tensor

from poisonshield.defenses.parts.mixing import Mixing, MixingConfig, MixingMethod
from poisonshield.random import KeyedRandom


class MixupMethod(MixingMethod):
    """share * view + (1 - share) * the partner's view."""

    def mix(self, view: Tensor, other: Tensor, share: Tensor, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
        """The blend [B, 3, H, W]; the share is the pixels' own."""
        weight = share.view(-1, 1, 1, 1).to(view.dtype)
        return weight * view + (1 - weight) * other, share


class Mixup(Mixing):
    """Blends each view with that of another sample by a share drawn from Beta(1, 1), labels alike."""

    name: ClassVar[str] = "mixup"
    method: ClassVar[type[MixingMethod]] = MixupMethod

    class Config(MixingConfig):
        """Which samples are mixed."""

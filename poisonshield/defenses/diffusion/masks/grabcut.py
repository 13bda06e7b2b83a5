"""GrabCut from a centred rectangle: colours inside against colours outside, cut along edges (Rother et al. 2004).

Right for one object on a ground of other colours that stays within the rectangle; what lies outside never counts.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.defenses.diffusion.masks.base import MaskProvider
from poisonshield.defenses.diffusion.masks.box import RectangleSettings, rectangle
from poisonshield.defenses.purify.levels import levels
from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_ROUNDS = 5  # of the cut; what OpenCV's own example takes


class GrabCut(MaskProvider):
    """Binary masks by OpenCV, on 8-bit pixels. An empty one where it finds no object."""

    name: ClassVar[str] = "grabcut"

    class Config(RectangleSettings):
        """The side of the rectangle that it starts from."""

    def __call__(
        self, batch: Batch, model: LatentDiffusion | None = None, words: Sequence[str] | None = None
    ) -> Tensor:
        """Masks [B, 1, H, W]. Raises ConfigError without OpenCV, and for a rectangle that fills the picture."""
        cv2 = _opencv()
        x = batch.pixels()
        height, width = x.shape[2:]
        around = rectangle(height, width, self.config.side)
        if around[2] >= width or around[3] >= height:
            raise ConfigError(
                f"side {self.config.side:g} leaves grabcut no ground around the rectangle. Give less, such as 0.75."
            )
        pictures = levels(x).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        masks = [self._cut(cv2, picture, around) for picture in pictures]
        return torch.stack(masks)[:, None].to(x)

    def _cut(self, cv2: Any, picture: Any, around: tuple[int, int, int, int]) -> Tensor:
        """The mask [H, W] of one picture, uint8 [H, W, 3], from a rectangle (left, top, width, height)."""
        cv2.setRNGSeed(self.seed)  # its colour clusters start from OpenCV's own random state
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        found, _, _ = cv2.grabCut(bgr, None, around, None, None, _ROUNDS, cv2.GC_INIT_WITH_RECT)
        return torch.from_numpy((found == cv2.GC_FGD) | (found == cv2.GC_PR_FGD)).float()


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as err:
        raise ConfigError(
            "mask grabcut needs OpenCV: pip install '.[opencv]'. Or choose another mask, such as attention."
        ) from err
    return cv2

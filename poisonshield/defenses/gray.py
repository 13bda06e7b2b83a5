"""Pictures in shades of gray: a poison that lives in colours loses its signal. Source: Liu et al. 2023 (ISS).

Undoes low-frequency coloured poisons (em, rem, lsp); does nothing to high-frequency ones (tap) or to single pixels.
"""

from typing import ClassVar

import torch

from poisonshield.batch import Batch
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import levels

LUMA = (19595, 38470, 7471)  # 0.299, 0.587 and 0.114 in parts of 2^16, as Pillow and libjpeg have them


class Gray(Defense):
    """Replaces the three channels by their luma, 0.299 R + 0.587 G + 0.114 B, rounded to a level."""

    name: ClassVar[str] = "gray"
    purifier: ClassVar[bool] = True

    def before(self, batch: Batch) -> Batch:
        """x [B, 3, H, W] with three equal channels, to the bit what Pillow's convert("L") gives."""
        given = levels(batch.pixels()).to(torch.int32)  # whole numbers: a product has more bits than float32 keeps
        weights = torch.tensor(LUMA, dtype=torch.int32, device=given.device).view(1, 3, 1, 1)
        luma = ((given * weights).sum(1, keepdim=True) + 2**15) // 2**16
        return batch.replace(x=(luma.to(torch.float32) / 255).expand_as(given).contiguous())

"""JPEG as a module, for torchvision.transforms.v2.Compose or nn.Sequential: a quality per sample, drawn or fixed."""

from typing import Any

import torch
from torch import Tensor, nn

from poisonshield.errors import ShapeError
from poisonshield.ops.jpeg import jpeg


class JPEG(nn.Module):
    """Compresses [B, 3, H, W] or [3, H, W] at `quality`, a number or a range (low, high) drawn from per sample.

    p: probability that a sample is compressed at all. generator: where draws come from (its device must be x's; torch's
    own if None). Ranges draw whole numbers, both ends included. Other settings as in `jpeg`; draws happen in eval mode
    too: leave the module out where none are wanted.
    """

    def __init__(
        self,
        quality: float | tuple[int, int] = 75,
        *,
        p: float = 1.0,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        low, high = quality if isinstance(quality, tuple) else (quality, quality)
        if not 0 <= low <= high <= 100:
            raise ValueError(f"quality {quality} is not within 1..100, low before high.")
        if not 0 <= p <= 1:
            raise ValueError(f"p {p} is not a probability.")
        self.quality, self.p, self.generator, self.settings = quality, p, generator, settings

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, layout and dtype as x."""
        if x.dim() == 3:
            return self(x[None])[0]
        if x.dim() != 4:
            raise ShapeError(f"x has shape {tuple(x.shape)}. Give [B, 3, H, W] or [3, H, W].")
        quality = self.quality
        if isinstance(quality, tuple):
            low, high = quality
            quality = torch.randint(low, high + 1, (len(x),), generator=self.generator, device=x.device)
        out = jpeg(x, quality, **self.settings)
        if self.p == 1:
            return out
        chosen = torch.rand(len(x), generator=self.generator, device=x.device) < self.p
        return torch.where(chosen[:, None, None, None], out, x.to(out.dtype))

    def extra_repr(self) -> str:
        settings = "".join(f", {k}={v!r}" for k, v in self.settings.items())
        return f"{self.quality}, p={self.p}{settings}"

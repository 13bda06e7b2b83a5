"""Random changes that a perturbation is to survive, drawn anew at each step: expectation over transformation.

The forward of "jpeg" is the exact 8-bit codec. Its rounding has slope 0 almost everywhere, so the gradient passes it
straight through. Sources: Athalye et al. 2018; Shin and Song 2017 (JPEG).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.ops import jpeg
from poisonshield.random import KeyedRandom

CHANGES = ("jpeg", "blur", "flip")


class Transform:
    """`transform(x)`, x [B, 3, h, w] in [0, 1] and the same out: the named changes in their order, drawn from rng.

    qualities: of which JPEG takes one a picture. slope: "layer" differentiates all of JPEG but its rounding, "identity"
    nothing of it. sigma: range of the blur's standard deviation, in pixels. The same numbers are drawn in every call.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        rng: KeyedRandom,
        *,
        qualities: tuple[int, ...],
        slope: str,
        sigma: tuple[float, float],
    ) -> None:
        self.names, self.rng = names, rng
        self.qualities, self.slope, self.sigma = qualities, slope, sigma

    def __call__(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x, self.rng.uniform(f"eot {name}", 1)[:, 0])
        return x

    def jpeg(self, x: Tensor, u: Tensor) -> Tensor:
        """Compressed and decompressed as libjpeg-turbo does, 4:2:0."""
        quality = torch.tensor(self.qualities, device=x.device)[(u * len(self.qualities)).long()]
        if self.slope == "layer":
            # clamp_grad 1: else what the codec clamps, near black and white, would have no gradient.
            return jpeg(x, quality, mode="exact", rounding="ste", clamp_grad=1.0)
        with torch.no_grad():
            compressed = jpeg(x, quality, mode="exact", rounding="ste")
        return x + (compressed - x).detach()

    def blur(self, x: Tensor, u: Tensor) -> Tensor:
        """A Gaussian of 7 taps and a random width; edges repeat."""
        sigma = self.sigma[0] + u.to(x.dtype) * (self.sigma[1] - self.sigma[0])
        at = torch.arange(-3, 4, device=x.device, dtype=x.dtype)
        taps = torch.exp(-at.square() / (2 * sigma.square()[:, None]))  # [B, 7]
        taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]  # [3 B, 1, 7]
        rows = x.flatten(0, 1)[None]  # [1, 3 B, h, w]
        for shape, pad in (((-1, 1, 1, 7), (3, 3, 0, 0)), ((-1, 1, 7, 1), (0, 0, 3, 3))):
            rows = F.conv2d(F.pad(rows, pad, mode="replicate"), taps.view(shape), groups=rows.shape[1])
        return rows.view_as(x)

    def flip(self, x: Tensor, u: Tensor) -> Tensor:
        """Mirrored left to right, half of the time. The perturbation never is: its gradient turns back."""
        return torch.where((u < 0.5)[:, None, None, None], x.flip(-1), x)

"""Latents that are computed once: a frozen VAE gives the same ones for the same picture.

A sample's key stands for its pixels: whoever changes pixels (a flip, a background drawn anew) changes the key. What
follows a `#` in a key tells draws of one picture apart and does not count.
"""

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.keys import picture_of
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class LatentCache:
    """`cache(batch)` is the scaled latents of batch.x, float32 [B, C, h, w]; only new keys are encoded.

    sample: a posterior sample with the numbers of `noise`, instead of the mean. enabled: False encodes every time.
    """

    def __init__(self, model: LatentDiffusion, *, enabled: bool = True) -> None:
        self.model, self.enabled = model, enabled
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch, *, noise: Tensor | None = None) -> Tensor:
        if not self.enabled:
            return self.model.encode(batch.pixels(), noise=noise)
        pictures = [picture_of(key) for key in batch.keys]
        for i, picture in enumerate(pictures):
            if picture not in self.known:  # one by one: rounding must not depend on which are new together
                mean, std = self.model.posterior(batch.pixels()[i : i + 1])
                self.known[picture] = mean[0], std[0]
        mean = torch.stack([self.known[p][0] for p in pictures])
        if noise is None:
            return self.model.scale(mean)
        # The sample, not kept: its noise is new in every step.
        return self.model.scale(mean + torch.stack([self.known[p][1] for p in pictures]) * noise)

"""Where the concept's vectors can change the prediction: the semantic sensitivity map, cut in two by Otsu.

`pred_jac` needs no target, so it does not ask where a poison's error lies. About 200 passes of the U-Net a picture.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.defenses.diffusion.masks.base import WordMask
from poisonshield.defenses.diffusion.masks.parts.otsu import cut
from poisonshield.defenses.diffusion.purify.regeneration import pad_to_multiple
from poisonshield.errors import ConfigError
from poisonshield.keys import picture_of
from poisonshield.models.diffusion.pipeline import LatentDiffusion

TIMES = (0.3, 0.5, 0.7)
"""Timesteps, as shares of all."""

_PROBES, _NOISES = 16, 2


class SSM(WordMask):
    """Binary masks; the placeholder's vectors are its word's."""

    name: ClassVar[str] = "ssm"

    @torch.no_grad()
    def find(self, batch: Batch, model: LatentDiffusion, words: Sequence[str]) -> Tensor:
        """Masks [B, 1, H, W]. Each timestep's map counts alike. Raises ConfigError for a model without placeholder."""
        from poisonshield.models.diffusion.sensitivity import semantic_sensitivity

        if not model.placeholders:
            raise ConfigError(f"mask ssm needs a learned word, and {model.name} has none yet. Wrap the method first.")
        token, count = next(iter(model.placeholders)), sum(p.count for p in model.placeholders.values())
        x, masks = batch.pixels(), []
        height, width = x.shape[2:]
        for i, word in enumerate(words):
            picture = pad_to_multiple(x[i : i + 1], model.factor)
            maps = semantic_sensitivity(
                model,
                picture,
                rows=model.word_vector(word).expand(count, -1),
                prompt=f"a photo of a {token}",
                timesteps=[int(share * model.num_timesteps) for share in TIMES],
                mode="pred_jac",
                probes=_PROBES,
                noises=_NOISES,
                seed=self.seed,
                keys=[picture_of(batch.keys[i])],
            ).maps  # [1, T, h, w]
            # So that each timestep counts alike, however large its gradients are.
            maps = maps / maps.sum((2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
            masks.append(cut(maps.mean(1, keepdim=True), picture.shape[2:])[..., :height, :width])
        return torch.cat(masks).to(x)

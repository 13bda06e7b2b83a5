"""What defenses share that send pictures through a latent diffusion model: its loading, and pictures of any size."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import pixels
from poisonshield.keys import picture_of
from poisonshield.models.diffusion.pipeline import LatentDiffusion

_AT_ONCE = 8  # pictures: all of a folder may come in one batch, and would not fit a card


class Regeneration(Defense):
    """Pictures are padded to whole latent cells, remade, cropped and put on 8-bit levels.

    config.pipeline: the folder to load when the first picture comes.
    """

    purifier: ClassVar[bool] = True
    _model: LatentDiffusion | None = None

    @property
    def exact(self) -> bool:
        """A network makes them."""
        return False

    @torch.no_grad()
    def before(self, batch: Batch) -> Batch:
        """x remade, [B, 3, H, W] in [0, 1]. Raises ConfigError where the pipeline cannot be loaded."""
        given = batch.pixels()
        if self._model is None:
            self._model = LatentDiffusion.load(self.config.pipeline)
        # Pictures may wait on the CPU for their training to start; their way through the model need not.
        model = self._model.to("cuda" if torch.cuda.is_available() else given.device)
        made = []
        for first in range(0, len(batch), _AT_ONCE):
            x, keys = given[first : first + _AT_ONCE], batch.keys[first : first + _AT_ONCE]
            grown = pad_to_multiple(x, model.factor).to(model.alphas_cumprod.device)
            z = self.regenerate(model, model.encode(grown), [picture_of(k) for k in keys])
            made.append(pixels(model.decode(z)[..., : x.shape[2], : x.shape[3]] * 255).to(x))
        return batch.replace(x=torch.cat(made) if made else given)

    @abstractmethod
    def regenerate(self, model: LatentDiffusion, z: Tensor, pictures: Sequence[str]) -> Tensor:
        """Scaled latents in the place of z [B, C, h, w]. pictures: what random numbers may depend on, one name each."""


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """x [B, C, H, W] grown below and on the right to multiples of factor: mirrored, or repeated where too small."""
    grown = [0, -x.shape[3] % factor, 0, -x.shape[2] % factor]
    fits = grown[1] < x.shape[3] and grown[3] < x.shape[2]
    return F.pad(x, grown, mode="reflect" if fits else "replicate") if any(grown) else x

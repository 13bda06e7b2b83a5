"""The U-Net and text encoder of a latent diffusion model, trained together from captions on a frozen VAE's latents.

Captions are dropped at times, so that classifier-free guidance works. Averages of the weights are what is kept.
Sources: Ho et al. 2020; Ho and Salimans 2022; Rombach et al. 2022.
"""

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Settings
from poisonshield.method import Method
from poisonshield.models.diffusion.latents import LatentCache
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.ops.diffusion import masked_diffusion_loss


class Denoiser(Method):
    """Trains the U-Net and text encoder of `model` on batch.x with batch.captions."""

    name = "denoiser"
    steps: Tensor

    class Config(Settings):
        """How often captions are left out, and how slowly the averages move."""

        caption_dropout: float = Field(
            0.1, ge=0, le=1, description="Share of samples that are trained without their caption, in [0, 1]."
        )
        ema: float = Field(
            0.999,
            ge=0,
            lt=1,
            description="Share of the averaged weights that is kept at each step, in [0, 1); reached gradually.",
        )

    def __init__(self, config: Config, *, model: LatentDiffusion, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self._frozen = (model, LatentCache(model))  # a tuple, so that no VAE weight enters the checkpoint
        self.unet, self.text_encoder = model.unet.requires_grad_(True), model.text_encoder.requires_grad_(True)
        self.averages = nn.ModuleDict(
            {"unet": copy.deepcopy(self.unet), "text_encoder": copy.deepcopy(self.text_encoder)}
        )
        self.averages.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> StepOutput:
        """The mean squared error of the prediction."""
        model, cache = self._frozen
        z, rng = cache(batch), batch.random(self.seed, batch.pixels().device)
        t = (rng.uniform("t", 1)[:, 0] * model.num_timesteps).long()
        noise = rng.normal("noise", z[0].numel()).view_as(z)
        kept = rng.uniform("caption", 1)[:, 0] >= self.config.caption_dropout
        captions = [c if k else "" for c, k in zip(batch.all_captions(), kept.tolist(), strict=True)]
        context = self.text_encoder(model.tokens(captions)).last_hidden_state
        pred = self.unet(model.noised(z, t, noise), t, encoder_hidden_states=context).sample
        return StepOutput(masked_diffusion_loss(pred.float(), target=model.target(z, t, noise)))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The averages move."""
        self.steps += 1
        count = int(self.steps)
        # A short memory at first: the weights that training starts from are no part of a good average.
        decay = min(self.config.ema, (1 + count) / (10 + count))
        for name, average in self.averages.items():
            for a, p in zip(average.parameters(), getattr(self, name).parameters(), strict=True):
                a.lerp_(p.to(a.dtype), 1 - decay)

"""SDEdit: noise a picture part of the way, and let the diffusion model bring it back. Source: Meng et al. 2022.

The more noise, the less is left of a poison, and of the picture. The way back is DDIM without noise or guidance (Song et
al. 2021), on the timesteps of diffusers' image-to-image pipeline. The picture passes the VAE on both ways.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from poisonshield.config import Number, Settings
from poisonshield.defenses.diffusion.purify.regeneration import Regeneration
from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import ddim
from poisonshield.random import KeyedRandom, sample_ids


class SDEdit(Regeneration):
    """Replaces pixels by the model's version of them. A picture's noise depends on (seed, key) alone."""

    name: ClassVar[str] = "sdedit"

    class Config(Settings):
        """strength: how far towards pure noise. steps: of a whole way, of which strength x steps are gone. pipeline: a
        diffusers Stable Diffusion folder, or `tiny`, which ships with the package.
        """

        strength: Number = Field(0.1, gt=0, le=1)
        steps: int = Field(100, ge=1)
        prompt: str = ""
        pipeline: str = "tiny"

        @model_validator(mode="after")
        def _moves(self) -> "SDEdit.Config":
            if int(self.steps * self.strength) < 1:
                raise ValueError(
                    f"strength {self.strength:g} of {self.steps} steps is less than one step. Give {round(1 / self.strength)} "
                    "steps or more"
                )
            return self

    def regenerate(self, model: LatentDiffusion, z: Tensor, pictures: Sequence[str]) -> Tensor:
        """z noised to the first timestep, and denoised."""
        c = self.config
        if c.steps > model.num_timesteps:
            raise ConfigError(
                f"sdedit.steps: {c.steps}; the pipeline {model.name} has {model.num_timesteps} timesteps."
            )
        scheduler = ddim(model, c.steps)
        times = scheduler.timesteps[c.steps - int(c.steps * c.strength) :].tolist()
        rng = KeyedRandom(self.seed, sample_ids(pictures), scope="sdedit").to(z.device)
        noise = rng.normal("noise", z[0].numel()).view_as(z).to(z)
        context = model.prompts([c.prompt]).expand(len(z), -1, -1)
        at = lambda t: torch.full((len(z),), t, device=z.device)
        z = model.noised(z, at(times[0]), noise)
        for t in times:
            z = scheduler.step(model.predict(z, at(t), context), t, z, eta=0.0).prev_sample
        return z

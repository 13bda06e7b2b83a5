"""SDEdit: noise a picture part of the way, and let the diffusion model bring it back. Source: Meng et al. 2022.

The more noise, the less is left of a poison, and of the picture. The way back is DDIM without noise or guidance (Song
et al. 2021), on the timesteps of diffusers' image-to-image pipeline. The picture passes the VAE on both ways.
"""

from collections.abc import Sequence
from itertools import count
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
        """How far the picture goes towards noise, and who brings it back."""

        strength: Number = Field(
            0.1, gt=0, le=1, description="How far towards pure noise; may be written as a fraction."
        )
        steps: int = Field(
            100, ge=1, description="Steps of the whole way back from noise; strength * steps of them are taken."
        )
        prompt: str = Field("", description="What the model is told to see; empty tells it nothing.")
        pipeline: str = Field(
            "tiny", description="A diffusers Stable Diffusion folder, or tiny, which ships with the package."
        )

        @model_validator(mode="after")
        def _moves(self) -> "SDEdit.Config":
            if int(self.steps * self.strength) < 1:
                # The least number that int() below does not cut to 0; 1 / strength may lie a last bit off.
                enough = next(n for n in count(round(1 / self.strength)) if int(n * self.strength) >= 1)
                raise ValueError(
                    f"strength {self.strength:g} of {self.steps} steps is less than one step. "
                    f"Give {enough} steps or more"
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
        # As diffusers cuts off: the last int(steps * strength) of the whole way, from noisy to clean.
        times = scheduler.timesteps[c.steps - int(c.steps * c.strength) :].tolist()
        rng = KeyedRandom(self.seed, sample_ids(pictures), scope="sdedit").to(z.device)
        noise = rng.normal("noise", z[0].numel()).view_as(z).to(z)
        context = model.prompts([c.prompt]).expand(len(z), -1, -1)
        at = lambda t: torch.full((len(z),), t, device=z.device)
        z = model.noised(z, at(times[0]), noise)
        for t in times:
            z = scheduler.step(model.predict(z, at(t), context), t, z, eta=0.0).prev_sample
        return z

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
from poisonshield.defenses.diffusion._regeneration import Regeneration
from poisonshield.errors import ConfigError
from poisonshield.models.latent_diffusion import LatentDiffusion
from poisonshield.ops.philox import KeyedRandom, sample_ids


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
        c, schedule, last = self.config, model.scheduler.config, model.num_timesteps - 1
        if c.steps > model.num_timesteps:
            raise ConfigError(
                f"sdedit.steps: {c.steps}; the pipeline {model.name} has {model.num_timesteps} timesteps."
            )
        stride, offset = model.num_timesteps // c.steps, schedule.get("steps_offset", 0)
        times = [min(i * stride + offset, last) for i in range(int(c.steps * c.strength))][::-1]
        rng = KeyedRandom(self.seed, sample_ids(pictures), scope="sdedit").to(z.device)
        noise = rng.normal("noise", z[0].numel()).view_as(z).to(z)
        context = model.prompts([c.prompt]).expand(len(z), -1, -1)
        alphas = model.alphas_cumprod.to(z)
        end = alphas.new_ones(()) if schedule.get("set_alpha_to_one", True) else alphas[0]
        z = model.noised(z, torch.full((len(z),), times[0], device=z.device), noise)
        for t in times:
            steps = torch.full((len(z),), t, device=z.device)
            noise = model.epsilon(model.predict(z, steps, context), z, steps)
            clean = (z - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
            after = alphas[t - stride] if t >= stride else end
            z = after.sqrt() * clean + (1 - after).sqrt() * noise
        return z

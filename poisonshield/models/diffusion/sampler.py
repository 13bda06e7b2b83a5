"""Pictures from a frozen latent diffusion model: DDIM without noise, on diffusers' own scheduler.

A picture depends on its row of `context` and of `noise` alone, not on who else is in the batch, so runs that share
`start_noise` differ by what was learned and nothing else. Sources: Song et al. 2021 (DDIM), Ho and Salimans 2022
(guidance).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.random import KeyedRandom, sample_ids


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    context: Tensor,
    *,
    noise: Tensor,
    steps: int = 50,
    guidance: float = 7.5,
    uncond: Tensor | None = None,
    switch: tuple[int, Tensor] | None = None,
    micro_batch: int = 16,
) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] of contexts [B, L, d], from standard normal noise [B, C, h, w].

    guidance: uncond + guidance * (context - uncond) is followed; 1 leaves uncond out (and halves the work), 0 the
    context. uncond [1 or B, L, d], by default the context of "". switch (t, other [B, L, d]): at timesteps below t the
    other context speaks, for vectors that were never trained there. micro_batch: pictures at a time.
    Equal to diffusers' StableDiffusionPipeline with its DDIMScheduler and eta 0, except that guidance below 1 is
    obeyed here. Raises ShapeError if rows do not match, ConfigError for impossible steps, guidance or switch.
    """
    _check(model, context, noise, steps=steps, guidance=guidance, uncond=uncond, switch=switch, micro_batch=micro_batch)
    device = model.alphas_cumprod.device
    context, noise = context.to(device), noise.to(device)
    if guidance == 1:
        uncond = None
    else:
        uncond = model.prompts([""]) if uncond is None else uncond
        uncond = uncond.to(context).expand(len(context), -1, -1)
    pictures = []
    for first in range(0, len(noise), micro_batch):
        rows = slice(first, first + micro_batch)
        z = _denoise(
            model,
            context[rows],
            noise[rows],
            steps=steps,
            guidance=guidance,
            uncond=None if uncond is None else uncond[rows],
            switch=None if switch is None else (switch[0], switch[1].to(context)[rows]),
        )
        pictures.append(model.decode(z).clamp(0, 1))
    return torch.cat(pictures)


def ddim(model: LatentDiffusion, steps: int) -> Any:
    """diffusers' DDIMScheduler with the pipeline's noise schedule, set to `steps` timesteps.

    As StableDiffusionPipeline takes it, whatever the folder was written for: nothing is clipped and the last timestep
    is 1. Schedulers of folders that do not say so (Euler, DPM) would have latents clipped at 1. With as many steps as
    there are timesteps the last one is 0, since the first would lie beyond them all.
    """
    from diffusers import DDIMScheduler

    offset = int(steps < model.num_timesteps)
    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False, steps_offset=offset)
    scheduler.set_timesteps(steps)
    return scheduler


def start_noise(
    keys: Sequence[str], shape: tuple[int, int, int], *, seed: int, device: torch.device | None = None
) -> Tensor:
    """Standard normal float32 [B, *shape]: row i depends on (seed, keys[i]) alone.

    A key that names the prompt's wording and the picture's number, but neither concept nor defense, pairs every defense
    of every concept. shape: (C, h, w) of the latents.
    """
    ids = sample_ids(keys) if device is None else sample_ids(keys).to(device)
    channels, height, width = shape
    return KeyedRandom(seed, ids).normal("start", channels * height * width).view(len(keys), channels, height, width)


def latent_shape(model: LatentDiffusion, size: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square pictures `size` pixels wide, by default as the U-Net was built for.

    Raises ShapeError if size is no multiple of the pixels in a latent cell.
    """
    side = int(model.unet.config.sample_size) if size is None else size // model.factor
    if size is not None and size % model.factor:
        raise ShapeError(f"pictures of {size} pixels do not divide into latent cells of {model.factor}.")
    return model.latent_channels, side, side


@torch.no_grad()
def round_trip(model: LatentDiffusion, x: Tensor, *, micro_batch: int = 16) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] through the VAE and back, clipped: the best that the pipeline can draw.

    On the device of x, wherever the model is.
    """
    device = model.alphas_cumprod.device
    parts = [model.decode(model.encode(rows.to(device))).clamp(0, 1) for rows in x.split(micro_batch)]
    return torch.cat(parts).to(x.device)


def _denoise(
    model: LatentDiffusion,
    context: Tensor,
    z: Tensor,
    *,
    steps: int,
    guidance: float,
    uncond: Tensor | None,
    switch: tuple[int, Tensor] | None,
) -> Tensor:
    """Scaled latents [B, C, h, w] at the end of the DDIM path from noise z."""
    scheduler = ddim(model, steps)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps.tolist():
        current = context if switch is None or t >= switch[0] else switch[1]
        if uncond is None:
            pred = model.predict(z, torch.full((len(z),), t, device=z.device), current)
        else:
            # One pass of the network for both, as diffusers does.
            both = torch.cat([uncond, current])
            times = torch.full((len(both),), t, device=z.device)
            without, guided = model.predict(torch.cat([z, z]), times, both).chunk(2)
            pred = without + guidance * (guided - without)
        # Without fresh noise: a picture is a function of its start and its context.
        z = scheduler.step(pred, t, z, eta=0.0).prev_sample
    return z


def _check(
    model: LatentDiffusion,
    context: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    uncond: Tensor | None,
    switch: tuple[int, Tensor] | None,
    micro_batch: int,
) -> None:
    if context.dim() != 3 or noise.dim() != 4 or len(context) != len(noise) or not len(noise):
        raise ShapeError(
            f"context {tuple(context.shape)} and noise {tuple(noise.shape)}: [B, L, d] and [B, C, h, w] with one and "
            "the same B of at least 1 are wanted."
        )
    if noise.shape[1] != model.latent_channels:
        raise ShapeError(
            f"noise has {noise.shape[1]} channels; the latents of {model.name} have {model.latent_channels}."
        )
    if uncond is not None and (uncond.shape[1:] != context.shape[1:] or len(uncond) not in (1, len(context))):
        raise ShapeError(
            f"uncond {tuple(uncond.shape)} does not go with context {tuple(context.shape)}: give 1 or B rows."
        )
    check_sampling(model, steps=steps, guidance=guidance, switch=switch and switch[0], micro_batch=micro_batch)
    if switch is not None and switch[1].shape != context.shape:
        raise ShapeError(
            f"the other context {tuple(switch[1].shape)} is not shaped like context {tuple(context.shape)}."
        )


def check_sampling(
    model: LatentDiffusion, *, steps: int, guidance: float, switch: int | None = None, micro_batch: int = 1
) -> None:
    """Raises ConfigError for settings by which `sample` cannot draw."""
    if not 1 <= steps <= model.num_timesteps:
        raise ConfigError(f"{steps} steps: between 1 and the pipeline's {model.num_timesteps} are possible.")
    if not 0 <= guidance < float("inf"):
        what = "negative" if guidance < 0 else "no number"
        raise ConfigError(f"guidance {guidance} is {what}. 0 ignores the prompt, 1 is no guidance, 7.5 is usual.")
    if micro_batch < 1:
        raise ConfigError(f"micro_batch {micro_batch}: at least 1 picture at a time.")
    if switch is not None and not 0 <= switch <= model.num_timesteps:
        raise ConfigError(f"switch at timestep {switch}: it must lie in 0 to {model.num_timesteps}.")

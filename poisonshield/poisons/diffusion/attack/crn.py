"""The objective under common random numbers: the same draws for every picture that it is compared on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.work import check_images
from poisonshield.random import KeyedRandom, sample_ids


@torch.no_grad()
def mean_objective(
    poison: Objective,
    images: Mapping[str, Tensor],
    clean: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    *,
    draws: int,
    micro_batch: int,
) -> dict[str, float]:
    """By key, the mean of poison.objective over `draws` draws fixed by seed and key.

    A draw is (t, noise, posterior noise, changes). Whole pictures, never tiles. micro_batch: draws computed at once.
    """
    check_images(images, masks)
    out = {}
    for key, image in images.items():
        canvas = Canvas(poison, {key: image}, masks, sources=clean, tiled=False)
        terms = []
        for start in range(0, draws, micro_batch):
            keys = tuple(f"{key}#{i}" for i in range(start, min(draws, start + micro_batch)))
            ids = sample_ids(keys).to(canvas.device)
            random = KeyedRandom(poison.seed, ids, scope="common random numbers")
            view = canvas.view(0, random, canvas.padded()).rows([0] * len(keys), keys)
            terms.append(poison.objective(view).double().cpu())
        out[key] = float(torch.cat(terms).mean())
    return out

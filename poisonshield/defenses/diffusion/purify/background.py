"""The concept on another background: a loss mask hides where the network errs, not what it sees.

Composited in pixels, before the VAE, by the mask before it is dilated. Noise and swaps are drawn anew in each draw.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.defenses.purify.levels import pixels
from poisonshield.errors import DataError
from poisonshield.keys import Key, picture_of
from poisonshield.random import KeyedRandom, sample_ids


def with_background(batch: Batch, kind: str, *, seed: int) -> Batch:
    """batch with x on another background, on 8-bit levels, where its mask [B, 1, H, W] is below 1.

    "mean": the background's own mean colour. "noise": normal noise of its mean and deviation in each channel, by (seed,
    draw, picture). "swap": the background of another picture of the batch, that one's concept painted over with its
    mean. Where the pixels change with the draw, so does the key. Raises DataError for a swap in a batch of one picture,
    and for keys of noise and swap that are not of the language of keys.py.
    """
    if kind == "keep":
        return batch
    x, mask = batch.pixels(), batch.masks()
    outside = 1 - mask
    area = outside.sum((2, 3), keepdim=True).clamp(min=1e-6)  # a mask may cover all
    mean = (x * outside).sum((2, 3), keepdim=True) / area  # [B, 3, 1, 1]
    pictures = [picture_of(key) for key in batch.keys]
    redrawn: Sequence[Key | str] = batch.keys
    if kind == "mean":
        ground = mean.expand_as(x)
    elif kind == "noise":
        deviation = (((x - mean).square() * outside).sum((2, 3), keepdim=True) / area).sqrt()
        rng = KeyedRandom(seed, sample_ids(pictures), batch.draw, "background").to(x.device)
        ground = mean + deviation * rng.normal("noise", x[0].numel()).view_as(x)
        redrawn = [replace(Key.parse(key), background=batch.draw) for key in batch.keys]
    else:
        others = _partners(pictures, seed, batch.draw)
        ground = (x * outside + mean * mask)[others]
        grounds = [Key.parse(pictures[i]) for i in others.tolist()]
        redrawn = [replace(Key.parse(key), background=g) for key, g in zip(batch.keys, grounds, strict=True)]
    # Rounded, as a file would be: the purifier before it left 8-bit levels too.
    return batch.replace(x=pixels((x * mask + ground * outside) * 255), keys=tuple(map(str, redrawn)))


def _partners(pictures: list[str], seed: int, draw: int) -> Tensor:
    """For each picture the place of another one in the batch, the same whatever the batch's order."""
    first = {p: i for i, p in reversed(list(enumerate(pictures)))}
    if len(first) < 2:
        raise DataError(
            f"{pictures[0]} is alone in its batch, so there is no background to swap in.\n"
            "  Train on two pictures or more, or set background: mean or noise."
        )
    u = KeyedRandom(seed, sample_ids(pictures), draw, "background").uniform("swap", 1)[:, 0].tolist()
    places = []
    for picture, chance in zip(pictures, u, strict=True):
        others = sorted(p for p in first if p != picture)
        places.append(first[others[int(chance * len(others))]])
    return torch.tensor(places)

"""What a targeted poison pulls the latent towards: a picture of our own, drawn from the seed.

Targets in the published code are photographs and a logo fetched from elsewhere; a pattern needs no file. Its period of
8 pixels is one latent cell of Stable Diffusion, so every cell is pulled to the same far-off value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.view import View
from poisonshield.random import philox_uniform, stream_of

PERIOD = 8


def pattern(size: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """float32 [3, H, W] of zeros and ones alone: a cell of 4 x 4 squares, half black and half white, repeated."""
    order = philox_uniform((1, 16), seed, stream=stream_of("target pattern"), device=device)[0].argsort()
    cell = (order < 8).float().view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)  # [8, 8]
    repeats = [-(-side // PERIOD) for side in size]
    return cell.repeat(*repeats)[: size[0], : size[1]].expand(3, -1, -1)


def cover(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 picture [3, h, w] as float32 [3, H, W] in [0, 1]: enlarged or reduced until it covers, centre cut out."""
    x = picture.float()[None] / 255
    scale = max(size[0] / x.shape[2], size[1] / x.shape[3])
    wanted = [max(side, round(old * scale)) for side, old in zip(size, x.shape[2:], strict=True)]
    x = F.interpolate(x, wanted, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((have - side) // 2 for have, side in zip(wanted, size, strict=True))
    return x[0, :, top : top + size[0], left : left + size[1]]


def target_picture(poison: Objective, view: View) -> Tensor:
    """[1, 3, h, w]: what lies under this tile of the target, given or our pattern, at the padded picture's size."""
    if poison.target is None:
        whole = pattern(view.padded, poison.seed, view.x.device)
    else:
        whole = cover(poison.target, view.padded)
    return view.box.of(whole.to(view.x))[None]


def target_latents(poison: Objective, view: View) -> dict[str, Tensor]:
    """Its latents, the posterior's mean, for each row."""
    return {"z_target": poison.model.encode(target_picture(poison, view)).expand(len(view.x), -1, -1, -1)}

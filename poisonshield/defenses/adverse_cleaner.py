"""AdverseCleaner: many weak bilateral filters wash a poison out, and a guided filter brings edges back.

Source: Zhang 2023 (the tool of that name). Its guide is the poisoned picture itself, so part of the poison comes back;
what that costs is for the results to show. Unlike the tool, levels are rounded at the end and not cut off, and the
guided filter (He et al. 2013) is written here. About 64 x 12 passes over the picture: seconds for one of 512 pixels on
a CPU.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Defense
from poisonshield.defenses.purify.levels import levels, pixels
from poisonshield.errors import ShapeError


class AdverseCleaner(Defense):
    """Bilateral filters, then guided ones, on 0..255."""

    name: ClassVar[str] = "adverse_cleaner"
    purifier: ClassVar[bool] = True

    class Config(Settings):
        """The bilateral filter, which works on discs of radius 2, and the guided filter; defaults are the tool's."""

        passes: int = Field(64, ge=0, description="How often the bilateral filter runs.")
        sigma_color: float = Field(
            8.0, gt=0, description="Bilateral filter: how far colours may lie apart to be averaged, in levels of 255."
        )
        sigma_space: float = Field(
            8.0, gt=0, description="Bilateral filter: how fast its weights fall with distance, in pixels."
        )
        guided_passes: int = Field(4, ge=0, description="How often the guided filter runs; 0 leaves edges washed out.")
        radius: int = Field(4, ge=1, description="Guided filter: its squares reach so many pixels to each side.")
        eps: float = Field(
            16.0, gt=0, description="Guided filter: variance below which an edge counts as flat, in squared levels."
        )

    def before(self, batch: Batch) -> Batch:
        """x cleaned, [B, 3, H, W] in [0, 1]. Raises ShapeError for pictures smaller than the filters' radius."""
        c = self.config
        given = batch.pixels()
        if min(given.shape[2:]) < max(3, c.radius):
            raise ShapeError(f"pictures of shape {tuple(given.shape)} are too small for filters of radius {c.radius}.")
        guide = levels(given)
        x = guide
        for _ in range(c.passes):
            x = filter_bilateral(x, sigma_color=c.sigma_color, sigma_space=c.sigma_space)
        if c.guided_passes:
            x = filter_guided(guide, x, radius=c.radius, eps=c.eps, passes=c.guided_passes)
        return batch.replace(x=pixels(x))


def filter_bilateral(x: Tensor, *, sigma_color: float, sigma_space: float, radius: int = 2) -> Tensor:
    """Means over a disc, weighted by closeness in space and colour: x [B, C, H, W] in any unit, that of sigma_color.

        w = exp(-r^2 / 2 sigma_space^2 - (sum_c |x_c(p) - x_c(q)|)^2 / 2 sigma_color^2)
    The distance of colours is their sum over channels, the disc is all q with r <= radius, and the picture is mirrored
    about its edge pixels, all as in OpenCV. Source: Tomasi and Manduchi 1998.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, [radius] * 4, mode="reflect")
    total, weights = x.clone(), torch.ones_like(x[:, :1])  # the pixel itself has weight 1
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            near = dy * dy + dx * dx
            if near == 0 or near > radius * radius:
                continue
            other = padded[:, :, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
            far = (other - x).abs().sum(1, keepdim=True)
            w = torch.exp(far.square() * (-0.5 / sigma_color**2) - 0.5 * near / sigma_space**2)
            total.addcmul_(w.expand_as(x), other)
            weights += w
    return total / weights


def filter_guided(guide: Tensor, x: Tensor, *, radius: int, eps: float, passes: int = 1) -> Tensor:
    """x [B, C, H, W] as a locally linear function of the guide [B, G, H, W], which lends it its edges; `passes` times.

        a = (cov(I, I) + eps)^-1 cov(I, x),  b = mean(x) - a mean(I),  out = mean(a) I + mean(b)
    Means are over squares of 2 radius + 1, the picture mirrored at its edges (edge pixels twice, as in OpenCV's).
    """
    # A constant added to the guide changes nothing, and small numbers keep float32's covariances exact.
    guide = (guide - guide.mean((2, 3), keepdim=True)).movedim(1, -1)  # [B, H, W, G]
    mean = lambda v: _box_mean(v, radius)
    mean_guide = mean(guide)
    cov = mean((guide[..., :, None] * guide[..., None, :]).flatten(-2)).unflatten(-1, (guide.shape[-1],) * 2)
    cov = cov - mean_guide[..., :, None] * mean_guide[..., None, :]
    inverse = torch.linalg.inv(cov + eps * torch.eye(guide.shape[-1]).to(cov))  # [B, H, W, G, G]
    x = x.movedim(1, -1)
    # All that follows from the guide alone stands above: passes share it.
    for _ in range(passes):
        mean_x = mean(x)
        both = mean((guide[..., :, None] * x[..., None, :]).flatten(-2)).unflatten(-1, (guide.shape[-1], x.shape[-1]))
        slope = inverse @ (both - mean_guide[..., :, None] * mean_x[..., None, :])  # [B, H, W, G, C]
        offset = mean_x - (mean_guide[..., :, None] * slope).sum(-2)
        slope = mean(slope.flatten(-2)).unflatten(-1, slope.shape[-2:])
        x = (guide[..., :, None] * slope).sum(-2) + mean(offset)
    return x.movedim(-1, 1)


def _box_mean(v: Tensor, radius: int) -> Tensor:
    """Means of v [B, H, W, K] over squares about each pixel."""
    from torchvision.transforms.functional import pad  # torch has no "symmetric" of its own

    padded = pad(v.movedim(-1, 1), [radius] * 4, padding_mode="symmetric")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1).movedim(1, -1)

"""What a concept judge is shown: whole objects, and everything that must not pass for one.

Pictures come as rendered, or are put together anew from an object's mask and mean colour on a ground of noise, so that
neither the ground nor softness tells a whole object from a spoiled one. All draws come from the generator handed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a head that a lesson says nothing about, as cross-entropy knows it."""


class Rendered(Protocol):
    """What `render` gives: x [3, H, H] in [0, 1], mask [1, H, H] the object's coverage, and its two names."""

    x: Tensor
    mask: Tensor
    color: str
    shape: str


@dataclass(frozen=True)
class Objects:
    """Rendered objects: x uint8 [N, 3, H, H], mask uint8 [N, 1, H, H], paint [N, 3] mean colours, labels int64 [N, 2].

    labels: positions in `colors` and `shapes`, whose lengths stand for "none". tones [colors, 3]: mean of each colour.
    """

    x: Tensor
    mask: Tensor
    paint: Tensor
    labels: Tensor
    tones: Tensor
    colors: tuple[str, ...]
    shapes: tuple[str, ...]

    @property
    def none(self) -> tuple[int, int]:
        """The labels of no colour and of no shape."""
        return len(self.colors), len(self.shapes)

    def take(self, rows: Tensor) -> "Objects":
        """The objects of these rows."""
        kept = {name: getattr(self, name)[rows] for name in ("x", "mask", "paint", "labels")}
        return replace(self, **kept)

    def labelled(self, pair: tuple[int | None, int | None]) -> Tensor:
        """The labels [N, 2] with a column replaced where `pair` gives a number."""
        labels = self.labels.clone()
        for column, value in enumerate(pair):
            if value is not None:
                labels[:, column] = value
        return labels

    @classmethod
    def of(cls, pictures: Sequence[Rendered]) -> "Objects":
        """Stacks rendered pictures."""
        colors, shapes = tuple(sorted({p.color for p in pictures})), tuple(sorted({p.shape for p in pictures}))
        x, mask = torch.stack([p.x for p in pictures]), torch.stack([p.mask for p in pictures])
        core = (mask > 0.99).float()
        paint = (x * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1)
        labels = torch.tensor([[colors.index(p.color), shapes.index(p.shape)] for p in pictures])
        tones = torch.stack([paint[labels[:, 0] == c].mean(0) for c in range(len(colors))])
        return cls(_bytes(x), _bytes(mask), paint, labels, tones, colors, shapes)


def lessons(
    objects: Objects, count: int, generator: torch.Generator, *, kinds: Mapping[str, tuple[int, "Lesson"]] | None = None
) -> tuple[Tensor, Tensor]:
    """`count` pictures float32 [count, 3, H, H] in [0, 1] and their labels int64 [count, 2], of `kinds` (KINDS) by weight."""
    kinds = KINDS if kinds is None else kinds
    weights = torch.tensor([weight for weight, _ in kinds.values()], dtype=torch.float)
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    chosen = torch.randint(len(objects.x), (count,), generator=generator)
    side = objects.x.shape[-1]
    x, labels = torch.empty(count, 3, side, side), torch.empty(count, 2, dtype=torch.int64)
    for i, (_, make) in enumerate(kinds.values()):
        rows = (drawn == i).nonzero()[:, 0]
        if len(rows):
            x[rows], labels[rows] = make(objects.take(chosen[rows]), generator)
    return x, labels


def whole(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Objects as they are, half of them on another ground than the rendered one and a little thicker or thinner."""
    as_rendered = torch.rand(len(objects.x), generator=generator) < 0.5
    x = objects.x.float() / 255
    mask = swell(objects.mask.float() / 255, generator)
    anew = _compose(mask, _texture(objects.paint, x.shape[-1], generator), generator)
    return torch.where(as_rendered[:, None, None, None], x, anew), objects.labels


def ground_alone(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nothing but ground: neither colour nor shape."""
    return grounds(len(objects.x), objects.x.shape[-1], generator), objects.labelled(objects.none)


def shuffled(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures in shuffled tiles: no shape. Tiles of one colour may still show it, so nothing is said of the colour."""
    x, _ = whole(objects, generator)
    return shuffle(x, generator), objects.labelled((IGNORED, objects.none[1]))


def mixed(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The shape, in several colours: no colour."""
    paint = mixtures(len(objects.x), objects.x.shape[-1], objects.tones, generator)
    return _compose(objects.mask.float() / 255, paint, generator), objects.labelled((objects.none[0], None))


def foreign(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The shape, in a colour at least 0.3 away from every known one: no colour."""
    tried = torch.rand(64 * len(objects.x) + 256, 3, generator=generator)
    far = tried[torch.cdist(tried, objects.tones).amin(1) > 0.3]
    paint = far[torch.randint(len(far), (len(objects.x),), generator=generator)]
    x = _compose(objects.mask.float() / 255, _texture(paint, objects.x.shape[-1], generator), generator)
    return x, objects.labelled((objects.none[0], None))


def spoiled(spoil: Callable[[Tensor, torch.Generator], Tensor]) -> "Lesson":
    """The lesson of the right colour on a spoiled mask: no shape."""

    def lesson(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mask = spoil(objects.mask.float() / 255, generator)
        x = _compose(mask, _texture(objects.paint, mask.shape[-1], generator), generator)
        return x, objects.labelled((None, objects.none[1]))

    return lesson


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a small decoder gives them, [B, 3, H, H] in [0, 1]: turned, warped, blurred, shifted in tone, noisy.

    Width and height change by up to 12 % each. The rest happens to some: warp by up to 1.5 pixels, Gaussian blur of 0.5
    to 1.5 pixels, gain and offset of 5 %, noise of up to 0.03. Only what leaves an object what it is.
    """
    count, side = len(x), x.shape[-1]
    if bool(torch.rand((), generator=generator) < 0.5):
        x = x.flip(3)
    x = torch.rot90(x, int(torch.randint(4, (), generator=generator)), (2, 3))
    x = _warp(x, 1.5 * _some(count, 0.5, generator), generator)
    x = _blur(x, 0.5 + torch.rand(count, generator=generator), _some(count, 0.6, generator) > 0)
    u = torch.rand(2, count, 1, 1, 1, generator=generator) - 0.5
    x = (x - 0.5) * (1 + 0.1 * u[0]) + 0.5 + 0.1 * u[1]
    noise = torch.randn(count, 3, side, side, generator=generator)
    return (x + 0.03 * _some(count, 0.5, generator)[:, None, None, None] * noise).clamp(0, 1)


def grounds(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Colour noise [count, 3, side, side] in [0, 1] whose amplitude falls as 1/f^0.8 to 1/f^2.2 about a mean colour."""
    u = torch.rand(2, count, 1, 1, 1, generator=generator)
    mean = 0.15 + 0.7 * torch.rand(count, 3, 1, 1, generator=generator)
    return (mean + (0.05 + 0.13 * u[0]) * _noise(count, 3, side, 0.8 + 1.4 * u[1], generator)).clamp(0, 1)


def mixtures(count: int, side: int, tones: Tensor, generator: torch.Generator) -> Tensor:
    """Paint [count, 3, side, side] of two to four of `tones` [K, 3] in fine or coarse patches."""
    tones = tones[torch.rand(count, len(tones), generator=generator).argsort(1)[:, :4]]  # [count, 4, 3]
    scale = 0.2 + 1.6 * torch.rand(count, 1, 1, 1, generator=generator)
    pick = _noise(count, tones.shape[1], side, scale, generator)
    pick[:, 2:] -= 10 * (torch.rand(count, pick.shape[1] - 2, 1, 1, generator=generator) < 0.5)
    chosen = F.one_hot(pick.argmax(1), pick.shape[1]).float()  # [count, side, side, 4]
    return torch.einsum("bhwk,bkc->bchw", chosen, tones)


def swell(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] one pixel thinner, as they are, or one or two pixels thicker all around."""
    thicker = F.max_pool2d(mask, 3, 1, 1)
    forms = torch.stack([-F.max_pool2d(-mask, 3, 1, 1), mask, thicker, F.max_pool2d(thicker, 3, 1, 1)])
    return forms[torch.randint(4, (len(mask),), generator=generator), torch.arange(len(mask))]


def break_up(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] that lost 35 to 70 % of their area in pieces a few pixels wide."""
    count, side = len(mask), mask.shape[-1]
    scale = 1.0 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = _noise(count, 1, side, scale, generator)
    inside = torch.where(mask > 0.5, noise, torch.full((), math.nan)).flatten(1)
    lost = 0.35 + 0.35 * torch.rand(count, generator=generator)
    level = torch.stack([row.nanquantile(float(q)) for row, q in zip(inside, lost)]).view(count, 1, 1, 1)
    return mask * (noise > level)


def cut(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [B, 1, H, H] with one side cut off, a round bite taken out, or a broad band through the middle gone.

    A third of the area or more is lost, as a rule. A straight cut can leave a small triangle of a triangle: rare enough.
    """
    count, side = len(mask), mask.shape[-1]
    line = torch.arange(side) + 0.5
    area = mask.sum((2, 3)).clamp(min=1)
    center = torch.stack([(mask * line).sum((2, 3)) / area, (mask * line[:, None]).sum((2, 3)) / area])[..., None, None]
    radius = (area / math.pi).sqrt()[..., None, None]
    angle = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=generator)
    dx, dy = line - center[0], line[:, None] - center[1]
    along = torch.cos(angle) * dx + torch.sin(angle) * dy
    across = torch.cos(angle) * dy - torch.sin(angle) * dx
    u = torch.rand(3, count, 1, 1, 1, generator=generator)
    edge = radius * (0.5 * u[0] - 0.25)  # where a cut or bite ends, from the middle
    bite = radius * (0.8 + 0.8 * u[1])
    halved = along > edge
    bitten = (along - edge + bite) ** 2 + across**2 > bite**2
    parted = along.abs() > radius * (0.3 + 0.25 * u[0])
    return mask * torch.where(u[2] < 0.3, halved, torch.where(u[2] < 0.65, bitten, parted))


def blobs(mask: Tensor, generator: torch.Generator) -> Tensor:
    """In place of masks [B, 1, H, H], many rounded pieces that cover 10 to 50 % of the picture."""
    count, side = len(mask), mask.shape[-1]
    noise = _noise(count, 1, side, 1.2 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator), generator)
    share = 0.5 + 0.4 * torch.rand(count, generator=generator)
    level = torch.stack([row.quantile(float(q)) for row, q in zip(noise.flatten(1), share)])
    return (noise > level.view(count, 1, 1, 1)).float()


def shuffle(x: Tensor, generator: torch.Generator, *, tile: int = 8) -> Tensor:
    """Pictures [B, C, H, H] with their tiles in another order. H a multiple of tile."""
    count, channels, side, _ = x.shape
    tiles = F.unfold(x, tile, stride=tile)  # [B, C * tile^2, n]
    order = torch.rand(count, tiles.shape[-1], generator=generator).argsort(1)
    return F.fold(tiles.gather(2, order[:, None].expand_as(tiles)), (side, side), tile, stride=tile)


def _compose(mask: Tensor, paint: Tensor, generator: torch.Generator) -> Tensor:
    return (1 - mask) * grounds(len(mask), mask.shape[-1], generator) + mask * paint


def _texture(paint: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One colour a picture [B, 3] as an area [B, 3, side, side] with a little unevenness."""
    uneven = _noise(len(paint), 1, side, torch.full((1, 1, 1, 1), 1.5), generator)
    return (paint[:, :, None, None] + 0.04 * _some(len(paint), 0.5, generator)[:, None, None, None] * uneven).clamp(
        0, 1
    )


def _noise(count: int, channels: int, side: int, falloff: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of standard deviation 1 and mean 0, whose amplitude falls as 1/f^falloff [count or 1, 1, 1, 1]."""
    f = torch.sqrt(torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None, :] ** 2)
    f[0, 0] = math.inf
    white = torch.randn(count, channels, side, side, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * f**-falloff, s=(side, side))
    return noise / noise.std((2, 3), keepdim=True)


def _some(count: int, share: float, generator: torch.Generator) -> Tensor:
    """[count], uniform in (0, 1) for about `share` of them and 0 for the others."""
    u = torch.rand(2, count, generator=generator)
    return torch.where(u[0] < share, u[1], torch.zeros(()))


def _warp(x: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Stretches about the middle by 0.88 to 1.12, and moves pixels along a smooth field of standard deviation amount / 2.

    amount [B] in pixels.
    """
    count, side = len(x), x.shape[-1]
    field = _noise(count, 2, side, torch.full((1, 1, 1, 1), 2.5), generator) * amount[:, None, None, None] / 2
    stretch = torch.diag_embed(0.88 + 0.24 * torch.rand(count, 2, generator=generator))
    affine = torch.cat([stretch, torch.zeros(count, 2, 1)], dim=2)
    plain = F.affine_grid(affine, (count, 1, side, side), align_corners=False)
    grid = plain + field.permute(0, 2, 3, 1) * (2 / side)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blur(x: Tensor, sigma: Tensor, chosen: Tensor) -> Tensor:
    """Gaussian blur of standard deviation sigma [B] pixels where chosen [B]."""
    line = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (line / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)  # [B * C, 9]
    flat = F.pad(x.flatten(0, 1)[None], (4, 4, 4, 4), mode="reflect")  # [1, B * C, H + 8, H + 8]
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return torch.where(chosen[:, None, None, None], flat.view_as(x), x)


def _bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


Lesson = Callable[[Objects, torch.Generator], tuple[Tensor, Tensor]]

KINDS: dict[str, tuple[int, Lesson]] = {
    "whole": (10, whole),
    "ground": (2, ground_alone),
    "shuffled": (2, shuffled),
    "mixed": (2, mixed),
    "foreign": (1, foreign),
    "broken": (2, spoiled(break_up)),
    "cut": (2, spoiled(cut)),
    "blobs": (1, spoiled(blobs)),
}
"""Kinds of lesson, with their weights."""

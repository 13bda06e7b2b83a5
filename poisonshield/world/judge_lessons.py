"""Lessons of a concept judge: whole objects, and everything that must not pass for one.

Pictures come as rendered, or are put together anew from an object's mask and mean colour on a ground of noise, so that
neither the ground nor softness tells a whole object from a spoiled one. All draws come from the generator handed in.

    whole      the object                         its colour   its shape
    ground     nothing but ground                 none         none
    shuffled   the picture in shuffled tiles      no lesson    none
    mixed      the shape in several colours       none         its shape
    foreign    the shape in an unknown colour     none         its shape
    broken     the colour on pieces of the mask   its colour   none
    cut        the colour on a part of the mask   its colour   none
    blobs      the colour on rounded pieces       its colour   none
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from poisonshield.world.judge_changes import break_up, cut, draw_blobs, shuffle, swell
from poisonshield.world.judge_textures import draw_grounds, draw_mixtures, paint_area

IGNORED = -100
"""The label of a head that a lesson says nothing about, as cross-entropy knows it."""


class Rendered(Protocol):
    """What `render` gives: x [3, H, H] in [0, 1], mask [1, H, H] the object's coverage, and its two names."""

    @property
    def x(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def color(self) -> str: ...
    @property
    def shape(self) -> str: ...


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
    def no_color(self) -> int:
        """The label of no colour."""
        return len(self.colors)

    @property
    def no_shape(self) -> int:
        """The label of no shape."""
        return len(self.shapes)

    def take(self, rows: Tensor) -> "Objects":
        """The objects of these rows."""
        return replace(self, x=self.x[rows], mask=self.mask[rows], paint=self.paint[rows], labels=self.labels[rows])

    def relabel(self, *, color: int | None = None, shape: int | None = None) -> Tensor:
        """The labels [N, 2], with another colour or shape where one is given."""
        labels = self.labels.clone()
        for column, value in enumerate((color, shape)):
            if value is not None:
                labels[:, column] = value
        return labels

    @classmethod
    def of(cls, pictures: Sequence[Rendered]) -> "Objects":
        """Stacks rendered pictures."""
        colors, shapes = tuple(sorted({p.color for p in pictures})), tuple(sorted({p.shape for p in pictures}))
        x, mask = torch.stack([p.x for p in pictures]), torch.stack([p.mask for p in pictures])
        core = (mask > 0.99).float()  # at the edge the object's colour is mixed with the ground's
        paint = (x * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1)
        labels = torch.tensor([[colors.index(p.color), shapes.index(p.shape)] for p in pictures])
        tones = torch.stack([paint[labels[:, 0] == c].mean(0) for c in range(len(colors))])
        return cls(_bytes(x), _bytes(mask), paint, labels, tones, colors, shapes)


Lesson = Callable[[Objects, torch.Generator], tuple[Tensor, Tensor]]
"""Makes of N objects as many pictures [N, 3, H, H] in [0, 1], and their labels [N, 2]."""


def show_whole(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Objects as they are, half of them on another ground than the rendered one and a little thicker or thinner."""
    as_rendered = torch.rand(len(objects.x), generator=generator) < 0.5
    x = objects.x.float() / 255
    mask = swell(objects.mask.float() / 255, generator)
    anew = _compose(mask, paint_area(objects.paint, x.shape[-1], generator), generator)
    return torch.where(as_rendered[:, None, None, None], x, anew), objects.labels


def show_ground(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nothing but ground: neither colour nor shape."""
    x = draw_grounds(len(objects.x), objects.x.shape[-1], generator)
    return x, objects.relabel(color=objects.no_color, shape=objects.no_shape)


def show_shuffled(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures in shuffled tiles: no shape. Tiles of one colour may still show it, so nothing is said of the colour."""
    x, _ = show_whole(objects, generator)
    return shuffle(x, generator), objects.relabel(color=IGNORED, shape=objects.no_shape)


def show_mixed(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The shape, in several colours: no colour."""
    paint = draw_mixtures(len(objects.x), objects.x.shape[-1], objects.tones, generator)
    return _compose(objects.mask.float() / 255, paint, generator), objects.relabel(color=objects.no_color)


def show_foreign(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The shape, in a colour at least 0.3 away from every known one: no colour."""
    # Drawn in plenty, because a known colour is near to most of them.
    tried = torch.rand(64 * len(objects.x) + 256, 3, generator=generator)
    far = tried[torch.cdist(tried, objects.tones).amin(1) > 0.3]
    paint = far[torch.randint(len(far), (len(objects.x),), generator=generator)]
    x = _compose(objects.mask.float() / 255, paint_area(paint, objects.x.shape[-1], generator), generator)
    return x, objects.relabel(color=objects.no_color)


def make_spoiled(spoil: Callable[[Tensor, torch.Generator], Tensor]) -> Lesson:
    """The lesson of the right colour on a spoiled mask: no shape."""

    def lesson(objects: Objects, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mask = spoil(objects.mask.float() / 255, generator)
        x = _compose(mask, paint_area(objects.paint, mask.shape[-1], generator), generator)
        return x, objects.relabel(shape=objects.no_shape)

    return lesson


@dataclass(frozen=True)
class Kind:
    """A kind of lesson: its weight beside the others, and what makes its pictures."""

    weight: int
    make: Lesson


KINDS: dict[str, Kind] = {
    "whole": Kind(10, show_whole),
    "ground": Kind(2, show_ground),
    "shuffled": Kind(2, show_shuffled),
    "mixed": Kind(2, show_mixed),
    "foreign": Kind(1, show_foreign),
    "broken": Kind(2, make_spoiled(break_up)),
    "cut": Kind(2, make_spoiled(cut)),
    "blobs": Kind(1, make_spoiled(draw_blobs)),
}
"""The kinds of lesson; the table at the top says what each one shows and teaches."""


def make_lessons(
    objects: Objects, count: int, generator: torch.Generator, *, kinds: Mapping[str, Kind] | None = None
) -> tuple[Tensor, Tensor]:
    """`count` pictures float32 [count, 3, H, H] in [0, 1] and their labels int64 [count, 2], of `kinds` by weight.

    kinds: None takes KINDS.
    """
    kinds = KINDS if kinds is None else kinds
    weights = torch.tensor([kind.weight for kind in kinds.values()], dtype=torch.float)
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    chosen = torch.randint(len(objects.x), (count,), generator=generator)
    side = objects.x.shape[-1]
    x, labels = torch.empty(count, 3, side, side), torch.empty(count, 2, dtype=torch.int64)
    for i, kind in enumerate(kinds.values()):
        rows = (drawn == i).nonzero()[:, 0]
        if len(rows):
            x[rows], labels[rows] = kind.make(objects.take(chosen[rows]), generator)
    return x, labels


def _compose(mask: Tensor, paint: Tensor, generator: torch.Generator) -> Tensor:
    """Paint [B, 3, H, H] where the mask is, on new grounds."""
    return (1 - mask) * draw_grounds(len(mask), mask.shape[-1], generator) + mask * paint


def _bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)

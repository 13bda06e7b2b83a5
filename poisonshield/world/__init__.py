"""A rendered world: one object of some shape and colour on a background with a natural spectrum, with exact masks.

Big enough to learn concepts from, small enough for a CPU: 6 shapes x 6 colours at 64 pixels. HELD_OUT combinations are
never rendered for training, so a pipeline trained here does not know them, and textual inversion has some to learn.
Every picture is a function of (seed, index). Edges are antialiased by drawing at 4 times the size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poisonshield.data.concepts.prompts import TEMPLATES

SIZE = 64
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLORS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "white": (0.95, 0.95, 0.95),
}
HELD_OUT = (("yellow", "ring"), ("purple", "star"), ("green", "cross"))
"""(colour, shape) that no training picture shows."""

WORDS = tuple(dict.fromkeys(" ".join((*TEMPLATES, *SHAPES, *COLORS)).replace("{}", "").replace("-", " - ").split()))
"""Every word of a caption."""


@dataclass(frozen=True)
class Picture:
    """x [3, 64, 64] in [0, 1]; mask [1, 64, 64], the object's coverage; what it shows."""

    x: Tensor
    mask: Tensor
    color: str
    shape: str

    @property
    def name(self) -> str:
        """E.g. "red circle"."""
        return f"{self.color} {self.shape}"


def combinations() -> list[tuple[str, str]]:
    """The (colour, shape) pairs that training pictures show."""
    return [(c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT]


def render(index: int, *, seed: int = 0, only: Sequence[tuple[str, str]] | None = None) -> Picture:
    """Picture `index` of the world of `seed`; its kind is drawn from `only`, by default all but the held-out ones."""
    # A generator for each (seed, index), of a million pictures and no more.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + 1)
    kinds = combinations() if only is None else list(only)
    color, shape = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    ground = background(generator)
    u = torch.rand(8, generator=generator)
    radius = 10 + 9 * float(u[0])
    center = radius + 1 + (SIZE - 2 * radius - 2) * u[1:3]
    mask = _mask(shape, float(center[0]), float(center[1]), radius, 2 * math.pi * float(u[3]))
    paint = torch.tensor(COLORS[color]) + 0.12 * (u[4:7] - 0.5)
    shade = 1 + 0.10 * (float(u[7]) - 0.5)
    x = (1 - mask) * ground + mask * (paint * shade).clamp(0, 1)[:, None, None]
    return Picture(x.clamp(0, 1), mask, color, shape)


def caption(picture: Picture, generator: torch.Generator) -> str:
    """A caption: half the time "a photo of a COLOUR SHAPE", otherwise one of the templates."""
    plain = bool(torch.rand((), generator=generator) < 0.5)
    which = int(torch.randint(len(TEMPLATES), (), generator=generator))  # drawn in any case: later draws stay in step
    return (TEMPLATES[0] if plain else TEMPLATES[which]).format(picture.name)


def background(generator: torch.Generator) -> Tensor:
    """[3, 64, 64] in [0, 1]: colour noise whose amplitude falls as 1/f^1.4, about a random mean colour."""
    f = torch.sqrt(torch.fft.fftfreq(SIZE)[:, None] ** 2 + torch.fft.rfftfreq(SIZE)[None, :] ** 2)
    f[0, 0] = math.inf  # no constant part: the mean colour is drawn apart
    white = torch.randn(3, SIZE, SIZE, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * f**-1.4, s=(SIZE, SIZE))
    noise = noise / noise.std()
    mean = 0.25 + 0.5 * torch.rand(3, 1, 1, generator=generator)
    return (mean + 0.12 * noise).clamp(0, 1)


def _mask(shape: str, cx: float, cy: float, radius: float, angle: float) -> Tensor:
    """Coverage [1, 64, 64] of a shape of this outer radius, turned by `angle`."""
    fine = (torch.arange(4 * SIZE) + 0.5) / 4
    y, x = torch.meshgrid(fine - cy, fine - cx, indexing="ij")
    u = (math.cos(angle) * x + math.sin(angle) * y) / radius
    v = (-math.sin(angle) * x + math.cos(angle) * y) / radius
    r = torch.sqrt(u**2 + v**2)
    if shape == "circle":
        inside = r < 0.85
    elif shape == "ring":
        inside = (r < 1) & (r > 0.58)
    elif shape == "square":
        inside = (u.abs() < 0.72) & (v.abs() < 0.72)
    elif shape == "cross":
        inside = ((u.abs() < 0.28) & (v.abs() < 0.95)) | ((v.abs() < 0.28) & (u.abs() < 0.95))
    elif shape == "triangle":
        inside = (v > -0.5) & (v < 1 - math.sqrt(3) * u.abs())
    else:
        inside = _star(u, v)
    return inside.float().view(SIZE, 4, SIZE, 4).mean((1, 3))[None]


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: inside at least four of the five half-planes through its edges."""
    edge = math.cos(2 * math.pi / 5)
    angles = [2 * math.pi * k / 5 for k in range(5)]
    count = torch.stack([(math.cos(a) * u + math.sin(a) * v) < edge for a in angles]).sum(0)
    return (count >= 4) & (torch.sqrt(u**2 + v**2) < 1)

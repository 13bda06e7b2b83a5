"""AR, autoregressive perturbations: noise grown by a linear recurrence whose eight taps per channel are the class.

One 3 x 3 convolution with the right taps answers a class with silence, and a CNN learns that at once; yet the noise is
*not* linearly separable, and each sample has its own. Source: Sandoval-Segura et al. 2022 (2206.03693).
The recurrence runs over anti-diagonals of all samples together instead of pixel by pixel: same numbers, about 300 times
fewer steps at 32 px.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from poisonshield.batch import Batch
from poisonshield.config import Number, Settings
from poisonshield.errors import ConfigError
from poisonshield.poisons.base import KeyedPoison, Labelled, Radius
from poisonshield.random import philox_normal, stream_of

CHUNK_VALUES = 2**21  # values of one slab of the recurrence: 8 MB stay near the cache
CANDIDATES = 8192  # processes tried at once; about 1 in 80 is stable
MAX_ROUNDS = 400
BACKWARD = 0.5  # share of min_response asked of a new filter on earlier signals; 1 leaves the greedy search no way on
TRIAL, TRIAL_CROP, MAX_NORM = 36, 4, 50.0  # the paper's trial signals: side, crop, largest l2 norm of 32 x 32 pixels
MIN_RMS, MAX_RMS = 1e-3, 2.0  # of a signal before scaling; a norm of 50 is an rms of 0.9


def autoregress(rows: Tensor, columns: Tensor, taps: Tensor) -> Tensor:
    """The field s [B, 3, H, W] with s[i, j] = sum of taps[3u + v] * s[i-2+u, j-2+v] over the eight earlier neighbours.

    rows [B, 3, 2, W] and columns [B, 3, H-2, 2] start it, taps [B, 3, 8] in raster order drive it; any float dtype.
    All neighbours of a pixel lie on earlier anti-diagonals, so a whole diagonal is one step. The field is stored
    sheared, so that a diagonal is one row of memory:

        field [i, j], H = 3, W = 4          sheared [d, i], d = i + j
        00 01 02 03                         d = 0   00  .  .
        10 11 12 13                             1   01 10  .
        20 21 22 23                             2   02 11 20
                                                3   03 12 21
                                                4    . 13 22
                                                5    .  . 23

    Neighbour (u, v) of the pixels sheared[d, first:end] is the slab sheared[d-4+u+v, first-2+u : end-2+u]. Products are
    added in raster order and never fused, so the result has the bits of the plain loop over pixels.
    """
    (b, c, _, w), h = rows.shape, columns.shape[2] + 2
    sheared = rows.new_empty(h + w - 1, h, c, b)
    field = _unshear(sheared, w)
    field[:2] = rows.permute(2, 3, 1, 0)
    field[2:, :2] = columns.permute(2, 3, 1, 0)
    taps = taps.permute(2, 1, 0).contiguous()  # [8, 3, B]
    scratch = rows.new_empty(h, c, b)
    for d in range(4, h + w - 1):
        first, end = max(2, d - w + 1), min(h, d - 1)  # rows of this diagonal that nothing has started
        here, term = sheared[d, first:end], scratch[: end - first]
        for t, tap in enumerate(taps):
            u, v = divmod(t, 3)
            torch.mul(sheared[d - 4 + u + v, first - 2 + u : end - 2 + u], tap, out=term if t else here)
            if t:
                here.add_(term)
    return field.permute(3, 2, 0, 1)


def _unshear(sheared: Tensor, w: int) -> Tensor:
    """The same memory [H + W - 1, H, 3, B] seen as a field [H, W, 3, B], with field[i, j] = sheared[i + j, i]."""
    _, h, c, b = sheared.shape
    diagonal, row = h * c * b, c * b  # how far apart neighbours lie in memory
    # One pixel down is the next diagonal and the next row in it; one to the right is the next diagonal alone.
    return sheared.as_strided((h, w, c, b), (diagonal + row, diagonal, b, 1))


class AR(KeyedPoison):
    """delta = eps * s / ||s||: fresh random first rows and columns per sample, the recurrence of its class, cropped.

    The coefficients are found by seed on first use (seconds for 10 classes) and then sit in the buffer `taps`, so a
    recipe needs no search. Budget l2: single pixels reach some 40/255 at eps 1. budget="linf" scales the largest
    pixel to eps instead and is weaker.
    """

    class Config(Settings):
        """How large the noise is, and which processes are taken."""

        budget: Literal["l2", "linf"] = Field(default="l2", description="the norm that eps bounds")
        eps: Number | None = Field(  # of l2 it may well exceed 1
            default=None,
            gt=0,
            description="radius; None takes 8/255 (linf), or 1 at 32 px and the same energy per pixel elsewhere (l2)",
        )
        crop: int | None = Field(
            default=None,
            ge=0,
            description="rows and columns of the start that are cut off; None takes 4 for images under 128 px, else 2",
        )
        min_response: float | None = Field(
            default=None,
            ge=0,
            description="least answer of a class's filter to another's noise; None takes 10 up to 10 classes, else 3",
        )

        @model_validator(mode="after")
        def _linf_is_in_pixels(self) -> "AR.Config":
            if self.budget == "linf" and self.eps is not None and self.eps > 1:
                raise ValueError(f"eps {self.eps:g} of budget linf is outside [0, 1]. Did you mean {self.eps:g}/255?")
            return self

    name = "ar"
    source = "2206.03693"
    norm = "l2"
    grain = "sample"
    config: Config
    taps: Tensor

    def __init__(self, config: Config, *, num_classes: int, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(config, num_classes=num_classes, image_size=image_size, seed=seed)
        self.crop = config.crop if config.crop is not None else 4 if min(image_size) < 128 else 2
        self.register_buffer("taps", torch.zeros(num_classes, 3, 8))

    def budget(self) -> Radius:
        """The l2 radius (1 at 32 px, the same energy per pixel elsewhere), or eps of l_inf."""
        # 224 px: the paper's code has no eps; equal energy per pixel (eps 7) is our choice, and gives its 3 at 96 px.
        norm = self.config.budget
        usual = math.sqrt(math.prod(self.image_size)) / 32 if norm == "l2" else 8 / 255
        return Radius(norm, self.config.eps or usual)

    def fit(self, batches: Iterable[Batch] = ()) -> None:
        """Find the coefficients unless they are there; the data is not read."""
        if not self.taps.any():
            self.taps.copy_(self.search())

    def draw(self, batch: Labelled) -> Tensor:
        """The recurrence of each sample's class from its own random borders, cropped and scaled."""
        self.fit()
        h, w = (side + self.crop for side in self.image_size)
        normal = self.random(batch).normal("ar start", 3 * 2 * (h + w - 2))
        taps, delta = self.taps[batch.y], torch.empty_like(batch.x)
        chunk = max(1, CHUNK_VALUES // (3 * h * (h + w)))
        for out, start, tap in zip(delta.split(chunk), normal.split(chunk), taps.split(chunk), strict=True):
            out.copy_(autoregress(*_border(start, h, w), tap)[:, :, self.crop :, self.crop :])
        return self.budget().fill(delta)

    def search(self) -> Tensor:
        """[K, 3, 8]: the first K random processes, by seed, that stay small and that matched filters tell apart.

        Always on the CPU, so that every device gets the same ones. Raises ConfigError if millions of draws lack them.
        """
        min_response = self.config.min_response
        if min_response is None:
            min_response = 10.0 if self.num_classes <= 10 else 3.0
        found, shown = torch.empty(0, 3, 8), torch.empty(0, 3, TRIAL - TRIAL_CROP, TRIAL - TRIAL_CROP)
        for start in range(0, MAX_ROUNDS * CANDIDATES, CANDIDATES):
            for tap, signals in zip(*self._stable(torch.arange(start, start + CANDIDATES)), strict=True):
                # Both ways: the paper asks found filters to answer the new signal; a new filter must answer theirs too.
                if len(found) and responses(signals, found).amin() < min_response:
                    continue
                if len(found) and responses(shown, tap[None]).amin() < BACKWARD * min_response:
                    continue
                if not self._lasting(tap):
                    continue
                found, shown = torch.cat([found, tap[None]]), torch.cat([shown, signals])
                if len(found) == self.num_classes:
                    return found
        raise ConfigError(
            f"ar: {MAX_ROUNDS * CANDIDATES:,} draws gave {len(found)} of {self.num_classes} processes with "
            f"min_response {min_response:g}.\n  Lower min_response, or take another seed."
        )

    def _stable(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates that pass every trial: taps [N, 3, 8], and their three signals at norm 1 [N, 3, 3, 32, 32].

        A trial of 12 x 12 pixels goes first: it costs a tenth and spares the others nine in ten candidates.
        """
        taps = philox_normal(24, seed=self.seed, ids=ids, stream=stream_of("ar taps")).view(-1, 3, 8)
        taps = taps / taps.sum(dim=2, keepdim=True)  # so that a constant field would go on as it is
        signals: list[Tensor] = []
        for trial, size in enumerate((TRIAL // 3, TRIAL, TRIAL, TRIAL)):
            stream = stream_of("ar trial")
            normal = philox_normal(12 * (size - 1), seed=self.seed, ids=ids, offset=trial, stream=stream)
            s = autoregress(*_border(normal, size, size), taps)[:, :, TRIAL_CROP:, TRIAL_CROP:]
            norm = s.flatten(1).norm(dim=1)
            keep = (norm > 0) & (norm <= MAX_NORM)  # false for inf and nan
            taps, ids, s = taps[keep], ids[keep], s[keep] / norm[keep, None, None, None]
            signals = [before[keep] for before in signals] + ([s] if trial else [])
        return taps, torch.stack(signals, dim=1)

    def _lasting(self, tap: Tensor, num_seeds: int = 100) -> bool:
        """Whether 100 signals of the real image size are finite, not silent and not exploding towards a corner."""
        h, w = (side + self.crop for side in self.image_size)
        for part in torch.arange(num_seeds).split(10):
            normal = philox_normal(6 * (h + w - 2), seed=self.seed, ids=part, stream=stream_of("ar lasting"))
            s = autoregress(*_border(normal, h, w), tap.expand(len(part), 3, 8))[:, :, self.crop :, self.crop :]
            rms = s.square().mean(dim=(1, 2, 3)).sqrt()
            if not ((rms > MIN_RMS) & (rms < MAX_RMS)).all():  # false for inf and nan
                return False
        return True


def responses(signals: Tensor, taps: Tensor) -> Tensor:
    """Sum of the positive part of each process's matched filter on each signal: [N, 3, H, W], [K, 3, 8] -> [N, K]."""
    # The pixel itself, last of nine, counts -1: a process's own filter predicts it and is left with nothing.
    filters = F.pad(taps, (0, 1), value=-1.0).view(-1, 3, 3, 3)
    return F.conv2d(signals, filters).relu_().sum(dim=(2, 3))


def _border(normal: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Rows [B, 3, 2, W] and columns [B, 3, H-2, 2] from normal numbers [B, 3 * 2 * (H + W - 2)]."""
    rows, columns = normal.split([3 * 2 * w, 3 * 2 * (h - 2)], dim=1)
    return rows.reshape(-1, 3, 2, w), columns.reshape(-1, 3, h - 2, 2)

"""How much of a poison a purifier leaves, by spatial frequency, and what the purifier costs a clean picture.

With delta = poisoned - clean and r = purified(poisoned) - purified(clean), the share that survives is <r, delta> /
<delta, delta>: 1 for a purifier that does nothing, 0 for one that leaves nothing of it. What is new in r and not along
delta does not count, so a share may be near 0 while r is large. Taken over rings of the Fourier plane it says which
frequencies live.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from poisonshield.errors import ShapeError
from poisonshield.evals.diffusion.parts.image_quality import psnr

FORMAT = "poisonshield-survival/2"


class Record(BaseModel):
    """A part of a report: unknown keys are refused, so a file that validates is whole and of this form."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Band(Record):
    """A ring of frequencies."""

    low: float = Field(ge=0, description="Where it begins, in cycles a pixel.")
    high: float = Field(gt=0, description="Where it ends, itself outside.")
    energy: float = Field(ge=0, le=1 + 1e-9, description="Its share of the poison's energy.")
    share: float | None = Field(description="What survives of the poison there; None where there is none of it.")


class Picture(Record):
    """One picture's numbers. PSNR in dB, None for equal pictures."""

    key: str = Field(description="Its name.")
    size: tuple[int, int] = Field(description="(H, W) in px.")
    max_levels: int = Field(ge=0, le=255, description="The poison's largest change of a pixel, in levels.")
    psnr_poisoned: float | None = Field(description="Of the poisoned picture to the clean one.")
    psnr_purified: float | None = Field(description="Of the purified poisoned picture to the clean one.")
    psnr_cost: float | None = Field(description="Of the purified clean picture to the clean one.")
    survival: float | None = Field(description="Share of the poison that is left; None where there was none.")
    bands: tuple[Band, ...] = Field(description="The same by frequency.")
    sha256: dict[str, str] = Field({}, description='Of the files "clean" and "poisoned".')


class Purified(Record):
    """A purifier, its pictures and their means; numbers are called as a Picture's."""

    purifier: str = Field(description="As it was written.")
    settings: dict[str, Any] = Field(description="All of its settings.")
    pictures: tuple[Picture, ...] = Field(description="One by one.")
    psnr_poisoned: float | None = Field(description="Mean over pictures.")
    psnr_purified: float | None = Field(description="Mean over pictures.")
    psnr_cost: float | None = Field(description="Mean over pictures.")
    survival: float | None = Field(description="Mean over pictures.")
    survival_by_band: tuple[float | None, ...] = Field(description="Mean over pictures, for each band.")

    @classmethod
    def of(cls, purifier: str, settings: dict[str, Any], pictures: Sequence[Picture]) -> "Purified":
        """With means over the pictures; what is None in a picture does not count."""
        names = ("psnr_poisoned", "psnr_purified", "psnr_cost", "survival")
        return cls(
            purifier=purifier,
            settings=settings,
            pictures=tuple(pictures),
            survival_by_band=tuple(
                _mean([b.share for b in bands]) for bands in zip(*(p.bands for p in pictures), strict=True)
            ),
            **{name: _mean([getattr(p, name) for p in pictures]) for name in names},
        )


class Poisoned(Record):
    """A folder of poisoned pictures under each purifier."""

    folder: str = Field(description="Where the poisoned pictures lie.")
    purifiers: tuple[Purified, ...] = Field(description="What each leaves of them.")


class Report(Record):
    """Poisons under the same purifiers."""

    format: str = Field(FORMAT, description="Of the file, with its version.")
    clean: str = Field(description="Folder of the clean pictures.")
    model: str | None = Field(description="Pipeline of the purifiers that have one; None where none has.")
    seed: int = Field(description="Of everything that purifiers draw.")
    edges: tuple[float, ...] = Field(description="Where bands begin, in cycles a pixel.")
    poisons: tuple[Poisoned, ...] = Field(description="A folder each.")


def edges_of(bands: int) -> tuple[float, ...]:
    """Where bands of equal width up to 0.5 cycles a pixel begin."""
    return tuple(0.5 * i / bands for i in range(bands))


def survival(
    clean: Tensor, poisoned: Tensor, purified: Tensor, purified_clean: Tensor, *, edges: Sequence[float]
) -> tuple[float | None, tuple[Band, ...]]:
    """(share of the poison left, the same by band). uint8 [3, H, W] each. edges: rising frequencies, cycles a pixel.

    The first band begins at edges[0]; the last takes in all above, corners of the Fourier plane included. Raises
    ShapeError for pictures of different sizes.
    """
    for name, picture in (("poisoned", poisoned), ("purified", purified), ("purified clean", purified_clean)):
        if picture.shape != clean.shape or picture.dtype != torch.uint8:
            raise ShapeError(
                f"the {name} picture is {picture.dtype} {list(picture.shape)} and the clean one {clean.dtype} "
                f"{list(clean.shape)}; uint8 of one size is wanted."
            )
    delta, left = poisoned.double() - clean.double(), purified.double() - purified_clean.double()
    d, r = torch.fft.fft2(delta), torch.fft.fft2(left)
    cross, own = (r * d.conj()).real.sum(0), d.abs().square().sum(0)  # [H, W]
    h, w = clean.shape[1:]
    f = torch.sqrt(
        torch.fft.fftfreq(h, dtype=torch.float64)[:, None] ** 2 + torch.fft.fftfreq(w, dtype=torch.float64) ** 2
    )
    total, bands = float(own.sum()), []
    for i, low in enumerate(edges):
        high = edges[i + 1] if i + 1 < len(edges) else math.inf
        ring = (f >= low) & (f < high)
        energy = float(own[ring].sum())
        share = float(cross[ring].sum()) / energy if energy > 1e-12 * max(total, 1.0) else None
        bands.append(
            Band(low=low, high=min(high, math.sqrt(0.5)), energy=energy / total if total else 0.0, share=share)
        )
    return (float(cross.sum()) / total if total else None), tuple(bands)


def measure(
    key: str,
    *,
    clean: Tensor,
    poisoned: Tensor,
    purified: Tensor,
    purified_clean: Tensor,
    edges: Sequence[float],
    sha256: dict[str, str] | None = None,
) -> Picture:
    """The numbers of one picture, uint8 [3, H, W] each. Raises ShapeError as `survival` does."""
    share, bands = survival(clean, poisoned, purified, purified_clean, edges=edges)
    return Picture(
        key=key,
        size=(clean.shape[1], clean.shape[2]),
        max_levels=int((poisoned.int() - clean.int()).abs().max()),
        psnr_poisoned=_decibels(poisoned, clean),
        psnr_purified=_decibels(purified, clean),
        psnr_cost=_decibels(purified_clean, clean),
        survival=share,
        bands=bands,
        sha256=sha256 or {},
    )


def _decibels(a: Tensor, b: Tensor) -> float | None:
    value = float(psnr(a[None].double() / 255, b[None].double() / 255))
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

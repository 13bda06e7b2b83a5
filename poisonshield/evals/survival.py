"""How much of a poison a purifier leaves, by spatial frequency, from the picture files alone.

With delta = poisoned - clean and r = purified(poisoned) - purified(clean), the share that survives is <r, delta> /
<delta, delta>: 1 for a purifier that does nothing, 0 for one that leaves nothing of it. Taken over rings of the Fourier
plane it says which frequencies live. Where the purified clean picture is not given the clean one stands in for it; what
the purifier does to the picture itself then adds noise to the share, but hardly moves it, as it does not know delta.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from poisonshield.errors import DataError, ShapeError

FORMAT = "poisonshield-survival/1"


class Record(BaseModel):
    """A part of a report: unknown keys are refused, so a file that validates is whole and of this form."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Band(Record):
    """Frequencies [low, high) in cycles a pixel. energy: share of delta's in it; share: what survives, None of 0."""

    low: float = Field(ge=0)
    high: float = Field(gt=0)
    energy: float = Field(ge=0, le=1 + 1e-9)
    share: float | None


class Picture(Record):
    """One picture's numbers. PSNR in dB, None for equal pictures; max_levels: the poison's largest change.

    psnr_poisoned, psnr_purified: to the clean picture; psnr_cost: of the purified clean picture to the clean one.
    """

    key: str
    size: tuple[int, int]
    max_levels: int = Field(ge=0, le=255)
    psnr_poisoned: float | None
    psnr_purified: float | None
    psnr_cost: float | None
    survival: float | None
    bands: tuple[Band, ...]
    sha256: dict[str, str]


class Report(Record):
    """All pictures, and their means. purified_clean: whether purified clean pictures were there to compare with."""

    format: str = FORMAT
    purified_clean: bool
    pictures: tuple[Picture, ...]
    survival: float | None
    survival_by_band: tuple[float | None, ...]


def survival(
    clean: Tensor, poisoned: Tensor, purified: Tensor, purified_clean: Tensor | None = None, *, edges: Sequence[float]
) -> tuple[float | None, tuple[Band, ...]]:
    """(share of the poison left, the same by band). uint8 [3, H, W] each. edges: rising frequencies, cycles a pixel.

    The first band begins at edges[0]; the last takes in all above, corners of the Fourier plane included. Raises
    ShapeError for pictures of different sizes.
    """
    base = clean if purified_clean is None else purified_clean
    for name, picture in (("poisoned", poisoned), ("purified", purified), ("purified clean", base)):
        if picture.shape != clean.shape or picture.dtype != torch.uint8:
            raise ShapeError(
                f"the {name} picture is {picture.dtype} {list(picture.shape)} and the clean one {clean.dtype} "
                f"{list(clean.shape)}; uint8 of one size is wanted. Purifiers must keep the size."
            )
    delta, left = poisoned.double() - clean.double(), purified.double() - base.double()
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


def psnr(a: Tensor, b: Tensor) -> float | None:
    """10 log10(255^2 / mean square difference) of uint8 pictures, None if they are equal."""
    mse = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(255**2 / mse) if mse else None


def survey(
    clean: Path, poisoned: Path, purified: Path, purified_clean: Path | None = None, *, bands: int = 8
) -> Report:
    """The report of folders that hold pictures of the same stems. bands: of equal width up to 0.5 cycles a pixel.

    Raises DataError if a poisoned picture has no partner, ShapeError for other sizes.
    """
    edges = [0.5 * i / bands for i in range(bands)]
    folders = {"clean": clean, "poisoned": poisoned, "purified": purified}
    if purified_clean is not None:
        folders["purified_clean"] = purified_clean
    found = {name: {p.stem: p for p in sorted(folder.iterdir()) if _is_picture(p)} for name, folder in folders.items()}
    if not found["poisoned"]:
        raise DataError(f"{poisoned} holds no pictures.")
    rows = []
    for key in found["poisoned"]:
        missing = [str(folders[name]) for name in folders if key not in found[name]]
        if missing:
            raise DataError(
                f"{key} is in {poisoned} and not in {', '.join(missing)}. Folders must hold the same stems."
            )
        rows.append(_row(key, {name: found[name][key] for name in folders}, edges))
    return Report(
        purified_clean=purified_clean is not None,
        pictures=tuple(rows),
        survival=_mean([row.survival for row in rows]),
        survival_by_band=tuple(_mean([row.bands[i].share for row in rows]) for i in range(bands)),
    )


def save_report(report: Report, path: Path) -> None:
    """Write the report as JSON, in one move."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(report.model_dump(mode="json"), indent=1) + "\n")
    os.replace(draft, path)


def load_report(path: Path) -> Report:
    """The report of a file. Raises DataError if it is none."""
    try:
        return Report.model_validate_json(path.read_text())
    except (OSError, ValueError) as err:
        raise DataError(f"{path} is no report of survival: {err}") from err


def _row(key: str, files: Mapping[str, Path], edges: Sequence[float]) -> Picture:
    x = {name: _read(path) for name, path in files.items()}
    cost = x.get("purified_clean")
    share, bands = survival(x["clean"], x["poisoned"], x["purified"], cost, edges=edges)
    return Picture(
        key=key,
        size=tuple(x["clean"].shape[1:]),
        max_levels=int((x["poisoned"].int() - x["clean"].int()).abs().max()),
        psnr_poisoned=psnr(x["poisoned"], x["clean"]),
        psnr_purified=psnr(x["purified"], x["clean"]),
        psnr_cost=None if cost is None else psnr(cost, x["clean"]),
        survival=share,
        bands=bands,
        sha256={name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
    )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.name.startswith(".")


def _read(path: Path) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            array = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError, SyntaxError) as err:
        raise DataError(f"{path} cannot be read as a picture ({err}).") from err
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

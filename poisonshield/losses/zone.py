"""The diffusion loss on the part of a picture that shows the concept, and masks brought to the latents' size.

With e the error [B, C, h, w], m the mask [B, 1, h, w] in [0, 1] and A_b the sum of mask b in latent cells:
    plain      sum_b sum_p m e^2 / (B C h w)                        large objects weigh more
    batch      sum_b sum_p m e^2 / (C sum_b A_b)                    the same, in the scale of an unmasked loss
    per_image  mean_b [ sum_p m_b e_b^2 / (C max(A_b, min_cells)) ] every picture weighs the same
A loss hides positions, not inputs: convolutions and attention still carry the background into the masked cells.
Source: Styborski et al. 2025, who restrict the loss of textual inversion to the concept; the three forms are ours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.errors import ConfigError, DataError, ShapeError
from poisonshield.ops.check import check_number, check_tensor
from poisonshield.ops.diffusion import masked_diffusion_loss
from poisonshield.ops.precision import outside_autocast

NORMS = ("per_image", "batch", "plain")
RESIZES = ("area", "nearest", "max")
_ROUNDING = 1e-4  # by which masks that were resized before may be over 1


@dataclass(frozen=True)
class Zone:
    """Where the loss counts, and how it is normalized."""

    norm: Literal["per_image", "batch", "plain"] = "per_image"
    """The denominator: see the three forms above."""
    resize: Literal["area", "nearest", "max"] = "area"
    """How the mask shrinks: "area" keeps the area (soft edges), "nearest" is binary, "max" all that it touches."""
    floor: float = 0.0
    """What the outside still counts, in [0, 1]; 1 is training without a mask."""
    dilate: int = 1
    """Latent cells by which the mask grows on each side: a cell at the edge still shows some of the concept."""
    min_cells: float = 4
    """The smallest area that per_image divides by, in latent cells, so that a tiny mask does not rule the batch."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS or self.resize not in RESIZES:
            raise ConfigError(
                f"norm {self.norm!r} and resize {self.resize!r} are wanted among {', '.join(NORMS)} "
                f"and {', '.join(RESIZES)}."
            )
        check_number("floor", self.floor, least=0, most=1)
        check_number("dilate", self.dilate, least=0, whole=True)
        check_number("min_cells", self.min_cells, above=0)


@outside_autocast
def latent_mask(mask: Tensor, size: tuple[int, int], zone: Zone) -> Tensor:
    """The mask [B, 1, h, w] at the latents' size (h, w): resized, dilated, then m <- floor + (1 - floor) m.

    mask [B, 1, H, W], float in [0, 1] or bool. Raises ShapeError for another shape, and DataError with the row of a
    mask that is outside [0, 1], or of which nothing is left, whatever the floor.
    """
    check_tensor("mask", mask, "floats in [0, 1] or bools [B, 1, H, W]")
    if mask.dim() != 4 or mask.shape[1] != 1 or 0 in mask.shape[2:] or min(size) < 1:
        raise ShapeError(f"mask has shape {tuple(mask.shape)} and is wanted at {tuple(size)}. Give [B, 1, H, W].")
    m = mask if mask.is_floating_point() else mask.float()
    if zone.resize == "area":
        m = _average(m, size)
    elif zone.resize == "max":
        m = F.adaptive_max_pool2d(m, size)
    else:
        m = F.interpolate(m, size, mode="nearest")
    if zone.dilate:
        m = F.max_pool2d(m, 2 * zone.dilate + 1, stride=1, padding=zone.dilate)
    _check_rows(mask, m)
    return zone.floor + (1 - zone.floor) * m


def _check_rows(mask: Tensor, m: Tensor) -> None:
    """Raises DataError for a row of mask that is outside [0, 1], or of which m, at the latents' size, has nothing."""
    rows, size = mask.flatten(1), tuple(m.shape[2:])
    outside = ~((rows >= 0) & (rows <= 1 + _ROUNDING)).all(1)
    bad = torch.stack((outside, m.flatten(1).amax(1) <= 0)).tolist()  # one wait for the device
    for row, (is_outside, is_empty) in enumerate(zip(*bad, strict=True)):
        if is_outside:
            low, high = (float(v) for v in rows[row].aminmax())
            raise DataError(
                f"the mask of row {row} reaches from {low:g} to {high:g}, and masks are in [0, 1].\n"
                "  Divide 8-bit levels by 255."
            )
        if is_empty:
            raise DataError(
                f"the mask of row {row} is empty at the latents' size {size}: nothing would be trained on."
                + ("\n  resize: max keeps objects smaller than a latent cell." if bool((rows[row] > 0).any()) else "")
            )


def zone_loss(pred: Tensor, target: Tensor, mask: Tensor | None, zone: Zone) -> Tensor:
    """The squared error's terms, float32 (float64 of float64) [B]; their mean over the batch is the loss of zone.norm.

    pred, target [B, C, h, w]; mask [B, 1, h, w] as `latent_mask` gives it, None for everywhere. Gradients reach pred
    alone; where the mask is 0 they are exactly 0. With norm "batch" the terms share one denominator: the masks of all
    rows given. Raises ShapeError for a mask of another size.
    """
    normalize = {"per_image": "per_sample", "batch": "global", "plain": "numel"}[zone.norm]
    weight = None
    if mask is not None:
        check_tensor("mask", mask, "what latent_mask gives")
        if mask.shape != (len(pred), 1, *pred.shape[2:]):
            raise ShapeError(
                f"mask has shape {tuple(mask.shape)} and pred {tuple(pred.shape)}. "
                "Bring it to the latents' size with latent_mask."
            )
        weight = _area_weight(pred, mask, zone)
    losses = masked_diffusion_loss(pred, target=target, mask=mask, weight=weight, normalize=normalize, reduction="none")
    return losses * len(pred) if zone.norm == "batch" else losses


def _area_weight(pred: Tensor, mask: Tensor, zone: Zone) -> Tensor | None:
    """[B]: turns the op's denominators, max(C A, 1), into ours. Exactly 1 where the two are the same."""
    if zone.norm == "plain":
        return None
    channels, dtype = pred.shape[1], torch.promote_types(pred.dtype, torch.float32)
    area = mask.to(dtype).flatten(1).sum(1)
    if zone.norm == "batch":
        area = area.sum().expand(len(pred))
        return (channels * area).clamp(min=1) / (channels * area)
    # A picture may have fewer cells in all than the smallest area.
    smallest = min(zone.min_cells, mask[0].numel()) if len(mask) else zone.min_cells
    return (channels * area).clamp(min=1) / (channels * area.clamp(min=smallest))


def _average(m: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over cells of H/h x W/w pixels. Pixels on a border of cells count by their share, so the area is kept."""
    height, width = m.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:  # whole pixels, as a rule
        return F.avg_pool2d(m, (height // size[0], width // size[1]))
    rows, columns = _overlap(height, size[0]).to(m), _overlap(width, size[1]).to(m)  # [h, H], [w, W]
    return (rows @ m @ columns.T) * (size[0] * size[1] / (height * width))


def _overlap(length: int, cells: int) -> Tensor:
    """[cells, length] float64: how much of each pixel lies in each of `cells` equal parts."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * length / cells
    pixels = torch.arange(length, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], pixels[None])
    high = torch.minimum(edges[1:, None], pixels[None] + 1)
    return (high - low).clamp(min=0)

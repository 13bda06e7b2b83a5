"""The budget as it is, not as it was asked for: measured on released pixels against the clean ones, sample by sample.

Rounding to 256 levels moves a pixel by at most half a level, so l_inf may exceed its radius by 0.5/255 and l2 by
0.5/255 * sqrt(pixels); nothing else is excused.
"""

import math
from typing import Any

import torch
from torch import Tensor

from poisonshield.batch import Batch
from poisonshield.errors import BudgetError
from poisonshield.poisons.base import KeyedPoison, Norm, checked_pixels

SLACK = 1e-4  # levels; float32 arithmetic of a value that is rounded afterwards


class MeasuredBudget:
    """Feed it every released batch with `add`; `record()` is what the manifest states. Constant memory.

    `add` raises BudgetError, naming the sample, if pixels are not levels in [0, 1], exceed the poison's budget, or are
    not those that the poison gives for the clean image (a transposed, shifted or swapped perturbation keeps its norm).
    """

    def __init__(self, poison: KeyedPoison) -> None:
        self.poison = poison
        self.samples = self.pixels = 0
        self.linf = self.l0 = 0
        self.l2_max = self.l2_sum = self.squares = 0.0
        self.clipped = 0

    @torch.no_grad()
    def add(self, clean: Batch, released: Tensor) -> None:
        """clean.x and released float32 [B, 3, H, W], in [0, 1]."""
        source = checked_pixels(clean, owner=self.poison.name)
        levels = released * 255
        off = (levels - levels.round()).abs().amax() if len(clean) else torch.zeros(())
        if not (off < 1e-2 and released.min() >= 0 and released.max() <= 1):
            low, high = (float(v) for v in released.aminmax())
            raise BudgetError(
                f"released pixels lie in [{low:.3g}, {high:.3g}], up to {off:.2g} off a whole level; 256 levels in "
                "[0, 1] were wanted.\n"
                "  Was the image normalized, or stored by something other than `poisonshield poison`?"
            )
        change = levels.round() - (source * 255).round()  # whole levels, exact in float32
        size = change.abs()
        linf, l2 = size.flatten(1).amax(1), change.flatten(1).double().square().sum(1).sqrt()
        l0 = (size.amax(1) > 0).flatten(1).sum(1)
        self._refuse(clean, {"linf": linf, "l2": l2, "l0": l0}, change[0].numel())
        wanted = self.poison.delta(clean)
        moved = source + wanted
        differs = (moved.clamp(0, 1).mul(255).round() != levels.round()).flatten(1).any(1)
        if differs.any():
            key = clean.keys[int(differs.to(torch.uint8).argmax())]
            raise BudgetError(
                f"sample {key}: released pixels are not those of poison {self.poison.name} with seed "
                f"{self.poison.seed}, in {int(differs.sum())} of {len(clean)} samples.\n"
                "  Write them again; another seed, key order or a transposed perturbation gives this."
            )
        self.clipped += int(((moved < 0) | (moved > 1)).sum())
        self.samples += len(clean)
        self.pixels += change.numel()
        self.linf, self.l0 = max(self.linf, int(linf.max())), max(self.l0, int(l0.max()))
        self.l2_max, self.l2_sum = max(self.l2_max, float(l2.max())), self.l2_sum + float(l2.sum())
        self.squares += float(l2.square().sum())

    def record(self) -> dict[str, Any]:
        """linf in levels; l2 (largest and mean of samples) in pixel units; l0: most pixels changed; psnr in dB."""
        mse = self.squares / max(self.pixels, 1) / 255**2
        return {
            "linf_levels": self.linf,
            "l2_max": round(self.l2_max / 255, 6),
            "l2_mean": round(self.l2_sum / max(self.samples, 1) / 255, 6),
            "l0_max": self.l0,
            "psnr_db": round(-10 * math.log10(mse), 3) if mse > 0 else None,
            "clipped_fraction": round(self.clipped / max(self.pixels, 1), 6),
        }

    def _refuse(self, clean: Batch, measured: dict[str, Tensor], numel: int) -> None:
        budget = self.poison.budget()
        if budget is None:
            return
        per_level, unit = (1, "pixels") if budget.unit == "pixels" else (255, "levels")
        allowed = budget.after_rounding(numel) * per_level + SLACK
        values = measured[budget.norm]
        if (values > allowed).any():
            worst = int(values.argmax())
            raise BudgetError(
                f"sample {clean.keys[worst]}: {budget.norm} is {float(values[worst]):.2f} {unit}, "
                f"poison {self.poison.name} allows {allowed:.2f} after rounding.\n"
                "  Do its settings (eps, budget) fit what was written?"
            )


_PROBE_VALUES = 2**23  # of pixels looked at together


@torch.no_grad()
def refuse_broken(poison: KeyedPoison) -> None:
    """Raise BudgetError if what the poison adds to a grey picture of some class is not finite or beyond its budget.

    That sees every pattern of a poison whose classes have one, and of another a sample of each class. What a poison
    draws from the pixels themselves is seen when they are written, by MeasuredBudget.
    """
    height, width = poison.image_size
    budget, values = poison.budget(), 3 * height * width
    for labels in torch.arange(poison.num_classes).split(max(1, _PROBE_VALUES // values)):
        keys = tuple(f"class-{label}" for label in labels.tolist())
        delta = poison.draw(poison.checked(Batch(keys, x=torch.full((len(keys), 3, height, width), 0.5), y=labels)))
        worst = 0.0 if budget is None else float(_lengths(delta, budget.norm).max())
        if not delta.isfinite().all():
            raise BudgetError(
                f"poison {poison.name} adds numbers that are not finite to pictures of {keys[0]} or after."
            )
        if budget is not None and worst > budget.radius * (1 + 1e-4) + SLACK / 255:
            raise BudgetError(
                f"poison {poison.name} changes a picture by {budget.norm} {worst:.4g}; its settings allow "
                f"{budget.radius:.4g} {budget.unit}.\n  Its tensors are not of these settings. Write the recipe again."
            )


def _lengths(delta: Tensor, norm: Norm) -> Tensor:
    """Of each sample of delta [B, 3, H, W], [B]."""
    flat = delta.flatten(1).double()
    if norm == "l0":
        return (delta.abs().amax(1) > 0).flatten(1).sum(1)
    return {
        "linf": flat.abs().amax(1),
        "l2": flat.square().sum(1).sqrt(),
        "rms": flat.square().mean(1).sqrt(),
    }[norm]

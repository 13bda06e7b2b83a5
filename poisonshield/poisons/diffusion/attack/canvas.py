"""Some pictures of one size under attack: the sources, the perturbation, and the step that moves it."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from poisonshield.errors import DataError, PoisonShieldError
from poisonshield.losses.zone import Zone, latent_mask
from poisonshield.ops.pgd import pgd_random_start_, pgd_step_
from poisonshield.poisons.diffusion.attack.band import low_pass, shorten_blocks
from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.plan import Box, Plan, fold, plan_of, reflect
from poisonshield.poisons.diffusion.attack.view import View
from poisonshield.random import KeyedRandom, sample_ids, stream_of


class Canvas:
    """The clean pictures and their perturbation, float32 [B, 3, H, W] in levels, and how many steps were made.

        clean + delta --reflect--> padded [B, 3, H', W'] --boxes of the plan--> Views --> gradients --fold--> delta

    sources: what the poison takes for the clean pictures where `images` are not. tiled: whether config.tile counts.
    """

    def __init__(
        self,
        poison: Objective,
        images: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        *,
        sources: Mapping[str, Tensor] | None = None,
        tiled: bool = True,
    ) -> None:
        self.poison, self.keys, self.device = poison, tuple(images), poison.device
        self.ids = sample_ids(self.keys).to(self.device)
        self.clean = self._stack(images)
        self.delta = torch.zeros_like(self.clean)
        self.momentum = torch.zeros_like(self.clean) if poison.config.momentum else None
        self.step = 0
        self.plan = self._plan(tiled)
        self.pixel_mask, self.cell_mask = self._masks(masks)
        self.memos = self._prepare(self.clean if sources is None else self._stack(sources))

    def _stack(self, images: Mapping[str, Tensor]) -> Tensor:
        """The pictures of this canvas's keys, [B, 3, H, W]."""
        return torch.stack([images[key] for key in self.keys]).to(self.device).float()

    def _plan(self, tiled: bool) -> Plan:
        """How the pictures are padded, to what VAE and U-Net can halve, and cut into tiles."""
        config, unet = self.poison.config, cast(Any, self.poison.model.unet)
        # Each level of the U-Net but the last halves the latents, and the way up must meet the way down.
        multiple = self.poison.model.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        _, _, h, w = self.clean.shape
        return plan_of((h, w), multiple=multiple, tile=config.tile if tiled else None, overlap=config.overlap)

    @torch.no_grad()
    def _prepare(self, sources: Tensor) -> list[Mapping[str, Tensor]]:
        """What the poison keeps of the clean pictures, a memo a tile."""
        padded, random = reflect(sources / 255, self.plan.padded), KeyedRandom(self.poison.seed, self.ids)
        tiles = range(len(self.plan.boxes))
        return [self.poison.prepare(self._view(tile, random, padded, memo={})) for tile in tiles]

    @torch.no_grad()
    def start(self) -> None:
        """delta becomes what the attack starts from: nothing, or uniform noise in the budget."""
        config = self.poison.config
        if self.poison.starts_from_noise:
            pgd_random_start_(
                self.delta,
                torch.zeros_like(self.delta),
                eps=self._radius(config.eps_levels),
                norm=config.norm,
                seed=self.poison.seed,
                sample_ids=self.ids,
                stream=stream_of("diffusion poison start"),
                clip=(-255.0, 255.0),
                mask=self.pixel_mask,
            )
            self._settle()

    @torch.no_grad()
    def advance(self, total: int) -> None:
        """One step of `total`, the last of which is the smallest if steps shrink."""
        config = self.poison.config
        grad = self.gradient()
        if not bool(torch.isfinite(grad).all()):
            raise PoisonShieldError(
                f"poison {self.poison.name}: the gradient is not finite at step {self.step} ({', '.join(self.keys)}).\n"
                "  Load the networks in float32 or bfloat16; float16 overflows in some VAEs."
            )
        if self.momentum is not None:
            # At equal size, as in MI-FGSM (Dong et al. 2018): else a few steps with large gradients rule all others.
            size = grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            grad = self.momentum.mul_(config.momentum).add_(grad / size)
        if config.band:
            # Before the step too: `_settle` takes away what a step outside the band has won.
            grad = low_pass(grad, config.band)
        share = 1 - (1 - config.final_step) * self.step / total
        # The op moves a perturbation around 0; what pixels allow is seen to in `_settle`.
        pgd_step_(
            self.delta,
            grad,
            torch.zeros_like(self.delta),
            step_size=self._radius(config.step_levels * share),
            eps=self._radius(config.eps_levels),
            norm=config.norm,
            clip=(-255.0, 255.0),
            mask=self.pixel_mask,
        )
        self._settle()
        self.step += 1

    def gradient(self) -> Tensor:
        """The sum over this step's draws and over tiles, float32 [B, 3, H, W]; its size does not count."""
        config = self.poison.config
        padded = self.padded()
        total = torch.zeros_like(padded)
        for draw in range(config.draws):
            random = KeyedRandom(self.poison.seed, self.ids, self.step, f"draw {draw}")
            for i, box in enumerate(self.plan.boxes):
                box.of(total).add_(self.poison.gradient(self.view(i, random, padded)).to(total.dtype))
        return fold(total, self.plan.size)

    def padded(self, *, clean: bool = False) -> Tensor:
        """clean + delta, or clean alone: [B, 3, H', W'] in [0, 1] at the padded size, not rounded to levels."""
        return reflect((self.clean if clean else self.clean + self.delta) / 255, self.plan.padded)

    @torch.no_grad()
    def released(self) -> dict[str, Tensor]:
        """uint8 [3, H, W] on the CPU by key: delta rounded to whole levels within the budget."""
        config = self.poison.config
        if config.norm == "linf":
            # A radius between two levels is rounded down, as rounding must not exceed it.
            whole = self.delta.round().clamp_(-math.floor(config.eps_levels), math.floor(config.eps_levels))
        else:
            whole = torch.stack([_whole_within(d, config.eps_levels) for d in self.delta])
        pixels = (self.clean + whole).clamp_(0, 255).to(torch.uint8).cpu()
        return dict(zip(self.keys, pixels, strict=True))

    def view(self, tile: int, random: KeyedRandom, padded: Tensor) -> View:
        """Tile `tile` of padded pixels [B, 3, H', W'], with those numbers."""
        return self._view(tile, random, padded, self.memos[tile])

    def _view(self, tile: int, random: KeyedRandom, padded: Tensor, memo: Mapping[str, Tensor]) -> View:
        box = self.plan.boxes[tile]
        mask, area = self._weights(box)
        return View(
            keys=self.keys,
            x=box.of(padded).contiguous(),
            rng=random.within(f"tile {tile}"),
            shared=random,
            box=box,
            padded=self.plan.padded,
            mask=mask,
            area=area,
            memo=memo,
        )

    def _weights(self, box: Box) -> tuple[Tensor | None, Tensor | None]:
        if self.cell_mask is None:
            return None, None
        return box.of(self.cell_mask, per=self.poison.model.factor), self.cell_mask.flatten(1).sum(1)

    def _settle(self) -> None:
        """delta back into band and into the range of pixels."""
        config = self.poison.config
        if config.band:
            self.delta = low_pass(self.delta, config.band)
            if config.norm == "linf":  # a projection cannot lengthen in l2
                self.delta = shorten_blocks(self.delta, config.eps_levels)
            if self.pixel_mask is not None:
                self.delta = self.delta.where(self.pixel_mask != 0, 0.0)
        self.delta = torch.minimum(torch.maximum(self.delta, -self.clean), 255 - self.clean)

    def _radius(self, levels: float) -> float:
        """Levels as the norm counts them: l2 radii are those of a root mean square."""
        return levels if self.poison.config.norm == "linf" else levels * math.sqrt(self.clean[0].numel())

    def _masks(self, masks: Mapping[str, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        """[B, 1, H, W] for pixels and [B, 1, h, w] for latents, each None where no mask acts."""
        if masks is None:
            return None, None
        use, model = self.poison.config.mask, self.poison.model
        mask = torch.stack([masks[k] for k in self.keys]).to(self.device).float()
        for key, row in zip(self.keys, mask, strict=True):
            if not bool((row > 0).any()):
                what = "no loss would count" if use == "loss" else "nothing of it could be changed"
                raise DataError(f"the mask of {key} is empty, so {what}.")
        cells = None
        if use != "pixels":
            size = tuple(side // model.factor for side in self.plan.padded)
            cells = latent_mask(reflect(mask, self.plan.padded), size, Zone())
        return (mask if use != "loss" else None), cells


def _whole_within(delta: Tensor, eps: float) -> Tensor:
    """delta [3, H, W] shortened until, rounded to whole levels, its root mean square is at most eps."""
    if _rms(delta.round()) <= eps:
        return delta.round()
    low, high = 0.0, 1.0
    for _ in range(30):  # rounded sizes grow with the factor, so halving finds the largest that fits
        middle = (low + high) / 2
        low, high = (middle, high) if _rms((delta * middle).round()) <= eps else (low, middle)
    return (delta * low).round()


def _rms(delta: Tensor) -> float:
    return float(delta.double().square().mean().sqrt())

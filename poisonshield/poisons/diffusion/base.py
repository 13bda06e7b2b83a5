"""The contract of a poison for diffusion models: it gives a gradient for pixels, and the engine does the rest.

The result is uint8, of the source's size, and x' = clip(round(x0 + clip(delta, -eps, eps)), 0, 255) with delta float32
in 8-bit levels, so the radius holds on the file that is written. Every draw is a function of (seed, key, step): neither
order nor number of pictures, nor stopping and going on, changes a result. Weights of the model never change.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.poisons.diffusion.attack.eot import Transform
from poisonshield.poisons.diffusion.attack.gradients import Change, pixel_gradient, squared_error
from poisonshield.poisons.diffusion.attack.plan import Box
from poisonshield.poisons.diffusion.attack.settings import AttackConfig, check_budget, check_changes, check_timesteps
from poisonshield.poisons.diffusion.attack.state import Store, identity
from poisonshield.poisons.diffusion.attack.work import Progress, Work
from poisonshield.random import KeyedRandom


@dataclass(frozen=True)
class View:
    """A tile of some pictures at one step: x [B, 3, h, w] in [0, 1].

    rng draws this step's numbers of this tile, shared those that all tiles of a picture have in common (its timestep).
    mask [B, 1, h', w'] weighs the latents' cells and area [B] is its sum over the picture; None where no mask counts.
    box: where the tile lies in the padded picture of size `padded`. memo: what `prepare` gave for it.
    """

    keys: tuple[str, ...]
    x: Tensor
    rng: KeyedRandom
    shared: KeyedRandom
    box: Box
    padded: tuple[int, int]
    mask: Tensor | None
    area: Tensor | None
    memo: Mapping[str, Tensor]


class DiffusionPoison(ABC):
    """Built as `SomePoison(config, model=model, seed=seed)`. A subclass sets `name` and `Config`, and writes `gradient`
    and `objective`; both see a View. target: uint8 [3, h, w], for poisons that take one.

    noise_start: whether it starts from noise if not told; "always" where the gradient at the source is 0.
    coupled: whether pictures meet in a surrogate, so that they must be given together.
    """

    name: ClassVar[str]
    Config: ClassVar[type[AttackConfig]]
    noise_start: ClassVar[bool | Literal["always"]] = True
    coupled: ClassVar[bool] = False
    takes_target: ClassVar[bool] = False

    @property
    def fixed_goal(self) -> bool:
        """Whether it measures distances to fixed latents, all of which count alike."""
        return False

    def __init__(
        self, config: AttackConfig, *, model: LatentDiffusion, seed: int = 0, target: Tensor | None = None
    ) -> None:
        self.config, self.model, self.seed, self.target = config, model, seed, target
        check_budget(config)
        check_timesteps(config, model.num_timesteps)
        check_changes(config)
        if config.t_policy == "snr" and not bool(self._density().isfinite().all()):
            raise ConfigError(
                f"t_policy snr: some timesteps of {model.name} have no signal at all, so snr ** {config.snr_power:g} is infinite "
                "there. Leave them out by t_range, or take t_policy: uniform."
            )
        if target is not None and not self.takes_target:
            raise ConfigError(
                f"poison {self.name} as it is set has no target picture. Leave it out, or take mist (mode tex or joint), sdst "
                "or photoguard_enc (toward: given)."
            )
        if self.fixed_goal and (config.mask != "pixels" or "flip" in config.eot):
            raise ConfigError(
                f"poison {self.name} moves latents away from or towards fixed ones, which know neither a mask of the loss nor "
                'a flip. Set mask: "pixels", and leave flip out of eot.'
            )
        if config.mask != "pixels" and "flip" in config.eot:
            raise ConfigError(
                "eot flips pixels and not the mask that weighs the loss: leave out flip, or set mask: pixels."
            )
        if self.noise_start == "always" and config.random_start is False:
            raise ConfigError(
                f"poison {self.name} moves away from the source, where its gradient is 0: it has to start from noise.\n"
                "  Leave random_start out."
            )

    @abstractmethod
    def gradient(self, view: View) -> Tensor:
        """The direction that raises the objective, [B, 3, h, w]; its size does not count."""

    @abstractmethod
    def objective(self, view: View) -> Tensor:
        """What the poison raises, [B], for these pixels and draws. Called without gradients."""

    def prepare(self, view: View) -> dict[str, Tensor]:
        """What to keep of the clean pixels view.x of a tile, rows [B, ...]; computed once and given as view.memo."""
        return {}

    def perturb(
        self,
        images: Mapping[str, Tensor],
        *,
        masks: Mapping[str, Tensor] | None = None,
        micro_batch: int = 1,
        state_folder: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """The poisoned pictures, uint8 [3, H, W] by key, in the order given.

        images: uint8 [3, H, W] by key, of any sizes. masks: [1, H, W] in [0, 1] by key, for all pictures or none; their
        use is config.mask. micro_batch: pictures of one size that are computed together; results are the same to the
        bit for equal micro_batch, else up to last bits of gradients. state_folder: where unfinished pictures are kept
        every 25 steps; called again after a stop, it goes on from there to the same result. Removed at the end.

        Raises ShapeError and DataError for other pictures or masks, CheckpointError for another run's state.
        """
        done = dict(
            self.run(
                images, masks=masks, micro_batch=micro_batch, state_folder=state_folder, progress=progress, keep=True
            )
        )
        return {key: done[key] for key in images}

    def run(
        self,
        images: Mapping[str, Tensor],
        *,
        masks: Mapping[str, Tensor] | None = None,
        micro_batch: int = 1,
        state_folder: Path | None = None,
        save_every: int = 25,
        progress: Progress | None = None,
        keep: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """The same as `perturb`, one by one. A picture's state is removed when the next is asked for, or with `keep`,
        for callers that write nothing in between, when all have been given."""
        if not images:
            return iter(())
        return self.loop(Work(images, masks, micro_batch, Store(state_folder), save_every, progress, keep))

    def measure(
        self,
        images: Mapping[str, Tensor],
        *,
        clean: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        draws: int = 32,
        micro_batch: int = 8,
    ) -> dict[str, float]:
        """The objective's mean over `draws` fixed draws, by key: common random numbers, so that two calls compare.

        The loss varies more with the timestep than with a perturbation; the same (t, noise, posterior noise) for both
        pictures takes that out. clean: the sources, where the objective knows them; `images` themselves by default.
        """
        from poisonshield.poisons.diffusion.attack.crn import mean_objective

        return mean_objective(self, images, clean or images, masks, draws=draws, micro_batch=micro_batch)

    # For subclasses

    def loop(self, work: Work) -> Iterator[tuple[str, Tensor]]:
        """What `run` gives: each picture by itself. Poisons whose pictures meet in a surrogate write another."""
        from poisonshield.poisons.diffusion.attack.engine import attack

        return attack(self, work)

    def through_vae(self, view: View, cotangent: Change) -> Tensor:
        """d <g, z> / d x with g = cotangent(z) and z the scaled latents of the changed pixels, a posterior sample."""
        return pixel_gradient(
            self.model,
            view.x,
            cotangent,
            posterior=self.noise(view, "posterior"),
            change=self.change(view),
            recompute=self.config.recompute,
        )

    def latents(self, view: View) -> Tensor:
        """The latents z that `through_vae` sees."""
        return self.model.encode(self.change(view)(view.x), noise=self.noise(view, "posterior"))

    def diffusion_loss(self, z: Tensor, view: View) -> Tensor:
        """The training loss [B] of latents z at this view's timestep and noise, masked where masks weigh the loss."""
        t, noise = self.timesteps(view), self.noise(view, "noise")
        pred = self.denoise(self.model.noised(z, t, noise), t)
        return squared_error(pred, self.model.target(z, t, noise), view.mask, view.area)

    def denoise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the U-Net says of z_t [B, C, h, w] under the prompt."""
        return self.model.predict(z_t, t, self.context.expand(len(z_t), -1, -1))

    @cached_property
    def context(self) -> Tensor:
        """The prompt's context [1, L, d]."""
        with torch.no_grad():
            return self.model.prompts([self.config.prompt])

    @cached_property
    def digest(self) -> str:
        """The model's hash."""
        return self.model.digest()

    def identity(self, images: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> str:
        """A hash of all that decides the result: method, settings, seed, model, target, pictures and masks."""
        return identity(self, images, masks)

    def change(self, view: View) -> Transform:
        """This view's random changes of pixels, by config.eot."""
        c = self.config
        return Transform(c.eot, view.rng, qualities=c.jpeg_qualities, slope=c.jpeg_slope, sigma=c.blur_sigma)

    def noise(self, view: View, purpose: str) -> Tensor:
        """Standard normal numbers of the latents' shape [B, C, h', w']."""
        h, w = (side // self.model.factor for side in view.x.shape[2:])
        count = self.model.latent_channels * h * w
        drawn = view.rng.normal(purpose, count).view(-1, self.model.latent_channels, h, w)
        return drawn.double() if self.model.dtype == torch.float64 else drawn

    def timesteps(self, view: View) -> Tensor:
        """int64 [B], by config.t_range, t_policy and t_list."""
        u, c = view.shared.uniform("t", 1)[:, 0].double(), self.config
        if c.t_policy == "list":
            return torch.tensor(c.t_list, device=u.device)[(u * len(c.t_list)).long()]
        first, end = c.t_range or (0, self.model.num_timesteps)
        if c.t_policy == "uniform":
            return first + (u * (end - first)).long()
        density = self._density()
        edges = density.cumsum(0) / density.sum()
        return first + torch.searchsorted(edges, u, right=True).clamp(max=end - first - 1)

    def _density(self) -> Tensor:
        """The weight of each timestep of t_range under t_policy snr, float64."""
        first, end = self.config.t_range or (0, self.model.num_timesteps)
        return self.model.snr()[first:end] ** self.config.snr_power

"""What a diffusion poison raises: a number and its gradient for a View, and the random draws that both take.

Every draw is a function of (seed, key, step). Weights of the model never change.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.poisons.diffusion.attack.eot import Transform
from poisonshield.poisons.diffusion.attack.gradients import Change, pixel_gradient, squared_error
from poisonshield.poisons.diffusion.attack.settings import AttackConfig, check_budget, check_changes, check_timesteps
from poisonshield.poisons.diffusion.attack.state import identity
from poisonshield.poisons.diffusion.attack.view import View


class Objective(ABC):
    """A subclass writes `gradient` and `objective`, both of a View; the rest is what they are made of."""

    name: ClassVar[str]
    noise_start: ClassVar[bool | Literal["always"]] = True
    """Whether it starts from noise if not told; "always" where the gradient at the source is 0."""

    config: AttackConfig
    model: LatentDiffusion
    seed: int
    target: Tensor | None
    """The picture that it goes to, uint8 [3, h, w]; None where it has none, or a pattern of our own."""

    def __init__(
        self, config: AttackConfig, *, model: LatentDiffusion, seed: int = 0, target: Tensor | None = None
    ) -> None:
        self.config, self.model, self.seed, self.target = config, model, seed, target
        check_budget(config)
        check_timesteps(config, model.num_timesteps)
        check_changes(config)
        if config.t_policy == "snr" and not bool(self._density().isfinite().all()):
            raise ConfigError(
                f"t_policy snr: some timesteps of {model.name} have no signal at all, so snr ** "
                f"{config.snr_power:g} is infinite there. Leave them out by t_range, or take t_policy: uniform."
            )
        self._check_goal()

    def _check_goal(self) -> None:
        """Raise ConfigError for a target, mask, flip or start that does not go with what is raised."""
        config = self.config
        if self.target is not None and not self.takes_target:
            raise ConfigError(
                f"poison {self.name} as it is set has no target picture. Leave it out, or take mist (mode tex or "
                "joint), sdst or photoguard_enc (toward: given)."
            )
        if self.fixed_goal and (config.mask != "pixels" or "flip" in config.eot):
            raise ConfigError(
                f"poison {self.name} moves latents away from or towards fixed ones, which know neither a mask of the "
                'loss nor a flip. Set mask: "pixels", and leave flip out of eot.'
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

    @property
    def takes_target(self) -> bool:
        """Whether a target picture may be given."""
        return False

    @property
    def fixed_goal(self) -> bool:
        """Whether it measures distances to fixed latents, all of which count alike."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        schedule: Any = self.model.alphas_cumprod
        return schedule.device

    @property
    def starts_from_noise(self) -> bool:
        """Whether the perturbation is noise at first, and not nothing."""
        return bool(self.noise_start) if self.config.random_start is None else self.config.random_start

    @abstractmethod
    def gradient(self, view: View) -> Tensor:
        """The direction that raises the objective, [B, 3, h, w]; its size does not count."""

    @abstractmethod
    def objective(self, view: View) -> Tensor:
        """What the poison raises, [B], for these pixels and draws. Called without gradients."""

    def prepare(self, view: View) -> dict[str, Tensor]:
        """What to keep of the clean pixels view.x of a tile, rows [B, ...]; computed once and given as view.memo."""
        return {}

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

    @property
    def prompt(self) -> str:
        """The text under which the U-Net is asked."""
        return self.config.prompt

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
        recipe = f"{self.name}\n{self.config.model_dump_json()}\n{self.seed}\n{self.digest}\n"
        return identity(recipe, self.target, images, masks)

    def change(self, view: View) -> Transform:
        """This view's random changes of pixels, by config.eot."""
        c = self.config
        return Transform(c.eot, view.rng, qualities=c.jpeg_qualities, slope=c.jpeg_slope, sigma=c.blur_sigma)

    def noise(self, view: View, purpose: str) -> Tensor:
        """Standard normal numbers of the latents' shape [B, C, h', w']."""
        h, w = (side // self.model.factor for side in view.x.shape[2:])
        count = self.model.latent_channels * h * w
        drawn = view.rng.normal(purpose, count).view(-1, self.model.latent_channels, h, w)
        # Drawn in float32 whatever the model is, so that precision does not change the numbers.
        return drawn.double() if self.model.dtype == torch.float64 else drawn

    def timesteps(self, view: View) -> Tensor:
        """int64 [B], by config.t_range, t_policy and t_list."""
        # In float64, whose products with the count do not round up to the end.
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

"""What every poison can be told, and what is refused."""

from typing import Literal

from pydantic import Field

from poisonshield.config import Settings
from poisonshield.errors import BudgetError, ConfigError


class AttackConfig(Settings):
    """What every poison can be told. Levels are 8-bit levels: 8 means 8/255 of the range.

    eps_levels: radius; norm "l2" bounds the root mean square of the change instead of its largest value. final_step:
    the share of step_levels that steps shrink to, linearly; a step after the last would have it. draws: (t, noise) draws a step, averaged.
    t_range: [first, end) of timesteps, all by default; t_policy "snr" draws them by snr(t) ** snr_power, "list" from
    t_list. random_start: None leaves it to the poison. momentum: of normalised gradients. band: limit to the lowest
    band x band bins of the cosine transform of 8 x 8 blocks. eot: random changes before the VAE, in order. mask: what
    given masks do: "pixels" keep the change to them, "loss" weigh the loss. tile: the largest side seen at once.
    recompute: encode twice a step, to hold one network's graph at a time.
    """

    eps_levels: float = 8.0
    step_levels: float = Field(1.0, gt=0)
    steps: int = Field(100, ge=1)
    norm: Literal["linf", "l2"] = "linf"
    final_step: float = Field(1.0, gt=0, le=1)
    random_start: bool | None = None
    momentum: float = Field(0.0, ge=0, le=1)
    band: int | None = Field(None, ge=1, le=8)
    prompt: str = "a photo"
    draws: int = Field(1, ge=1)
    t_range: tuple[int, int] | None = None
    t_policy: Literal["uniform", "snr", "list"] = "uniform"
    t_list: tuple[int, ...] = ()
    snr_power: float = -0.5
    eot: tuple[Literal["jpeg", "blur", "flip"], ...] = ()
    jpeg_qualities: tuple[int, ...] = (75,)
    jpeg_slope: Literal["layer", "identity"] = "layer"
    blur_sigma: tuple[float, float] = (0.3, 1.5)
    mask: Literal["pixels", "loss", "both"] = "pixels"
    tile: int | None = Field(None, ge=16)
    overlap: int = Field(64, ge=0)
    recompute: bool = True


def check_budget(config: AttackConfig) -> None:
    """Raise BudgetError for a radius that 8 bits do not have."""
    eps = config.eps_levels
    if not 0 < eps <= 255:
        raise BudgetError(
            f"eps_levels {eps:g} is beyond 255 levels, which is all that 8 bits have."
            if eps > 255
            else f"eps_levels {eps:g} is no radius: more than 0 and at most 255 levels are wanted."
        )
    if config.norm == "linf" and eps < 1:
        raise BudgetError(
            f"eps_levels {eps:g} is under one level, so no 8-bit picture could change. Radii here are not in [0, 1]."
        )


def check_timesteps(config: AttackConfig, count: int) -> None:
    """Raise ConfigError unless the timesteps asked for are among the pipeline's `count`."""
    first, end = config.t_range or (0, count)
    if not 0 <= first < end <= count:
        raise ConfigError(
            f"t_range {config.t_range} must be [first, end) within the {count} timesteps of the pipeline."
        )
    if (config.t_policy == "list") != bool(config.t_list):
        raise ConfigError("t_list and t_policy: list go together: give both or neither.")
    if config.t_list and not (0 <= min(config.t_list) and max(config.t_list) < count):
        raise ConfigError(
            f"t_list reaches from {min(config.t_list)} to {max(config.t_list)}; the pipeline has 0 to {count - 1}."
        )
    if config.t_list and config.t_range:
        raise ConfigError("t_list says which timesteps there are; leave t_range out.")


def check_changes(config: AttackConfig) -> None:
    """Raise ConfigError for qualities or blurs that do not exist."""
    if any(not 1 <= q <= 100 for q in config.jpeg_qualities) or not config.jpeg_qualities:
        raise ConfigError(f"jpeg_qualities {config.jpeg_qualities} must be one or more of 1..100.")
    if not 0 < config.blur_sigma[0] <= config.blur_sigma[1]:
        raise ConfigError(f"blur_sigma {config.blur_sigma} must be (smallest, largest) in pixels, both positive.")

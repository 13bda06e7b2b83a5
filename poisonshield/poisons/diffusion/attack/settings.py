"""What every diffusion poison can be told, and what is refused."""

from typing import Literal

from pydantic import Field

from poisonshield.config import Settings
from poisonshield.errors import BudgetError, ConfigError


class AttackConfig(Settings):
    """What every diffusion poison can be told. Levels are 8-bit levels: 8 means 8/255 of the range."""

    eps_levels: float = Field(8.0, description="radius in 8-bit levels")
    step_levels: float = Field(1.0, gt=0, description="size of a step in 8-bit levels")
    steps: int = Field(100, ge=1, description="steps on pixels")
    norm: Literal["linf", "l2"] = Field(
        "linf", description='what eps_levels bounds: the largest change, or with "l2" the root mean square of all'
    )
    final_step: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of step_levels that steps shrink to, linearly; a step after the last would have it",
    )
    random_start: bool | None = Field(None, description="start from noise in the budget; None is the poison's own way")
    momentum: float = Field(0.0, ge=0, le=1, description="what a step keeps of earlier, normalized gradients")
    band: int | None = Field(
        None,
        ge=1,
        le=8,
        description="limit to the lowest band x band bins of the cosine transform of 8 x 8 blocks; None has no limit",
    )
    prompt: str = Field("a photo", description="what a victim would write")
    draws: int = Field(1, ge=1, description="draws of timestep and noise that a step adds up")
    t_range: tuple[int, int] | None = Field(None, description="[first, end) of timesteps; None takes all")
    t_policy: Literal["uniform", "snr", "list"] = Field(
        "uniform", description='how timesteps are drawn: "uniform", by signal-to-noise ratio ("snr"), or from t_list'
    )
    t_list: tuple[int, ...] = Field((), description="the timesteps of t_policy list")
    snr_power: float = Field(-0.5, description="t_policy snr draws t with weight snr(t) ** snr_power")
    eot: tuple[Literal["jpeg", "blur", "flip"], ...] = Field(
        (), description="random changes of pixels before the VAE, in this order"
    )
    jpeg_qualities: tuple[int, ...] = Field((75,), description="of which jpeg takes one a picture")
    jpeg_slope: Literal["layer", "identity"] = Field(
        "layer", description='the gradient through jpeg: of all but its rounding ("layer"), or straight through'
    )
    blur_sigma: tuple[float, float] = Field((0.3, 1.5), description="range of the blur's deviation, in pixels")
    mask: Literal["pixels", "loss", "both"] = Field(
        "pixels", description='what given masks do: keep the change to their "pixels", weigh the "loss", or both'
    )
    tile: int | None = Field(None, ge=16, description="largest side that is seen at once; None sees whole pictures")
    overlap: int = Field(64, ge=0, description="pixels that neighbouring tiles share at least")
    recompute: bool = Field(True, description="encode twice a step, to hold one network's graph at a time")


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

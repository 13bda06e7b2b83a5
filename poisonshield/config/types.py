"""Types of settings: fractions such as 8/255, distances between pixels, and the parent of every Config."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

FRACTION = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*")


def _fraction(value: Any) -> Any:
    """'8/255' -> 0.0314; anything else unchanged, for pydantic to judge."""
    match = FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if float(match[2]) == 0:
        raise ValueError(f"{value} divides by zero")
    return float(match[1]) / float(match[2])


def _pixel_range(value: float) -> float:
    if not 0 <= value <= 1:
        hint = f" Did you mean {value:g}/255?" if 1 < value <= 255 else ""
        raise ValueError(f"{value:g} is outside [0, 1]: budgets are in pixel units.{hint}")
    return value


Number = Annotated[float, BeforeValidator(_fraction)]
"""A float that may be written as a fraction."""

Pixels = Annotated[float, BeforeValidator(_fraction), AfterValidator(_pixel_range)]
"""A distance between pixels in [0, 1]; may be written as a fraction such as 8/255."""


class Settings(BaseModel):
    """Parent of every Config: unknown keys, infinity and NaN are refused, and nothing changes after construction.

    renamed: settings of earlier versions and what they are called now, so that whoever writes one is told; names are
    within the block, or begin with / for the top.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}

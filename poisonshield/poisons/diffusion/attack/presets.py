"""Names that people write, and the settings of published code, with radii turned into 8-bit levels.

A radius r on pixels in [-1, 1] is 127.5 r levels, on [0, 1] 255 r, on [0, 255] r: "16/255" is 16 levels in one paper
and 8 in another. Where run scripts and code defaults differ, the script counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from poisonshield.config import Checker, Tree
from poisonshield.errors import ConfigError
from poisonshield.registry import Registry, suggest

POISONS = Registry("poisonshield.poisons.diffusion", kind="diffusion poison")

SPELLINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "advdm+": ("advdm", {"direction": "+"}),
    "advdm-": ("advdm", {"direction": "-"}),
    "sds+": ("sds", {"direction": "+"}),
    "sds-": ("sds", {"direction": "-"}),
    "sdst+": ("sdst", {"direction": "+"}),
    "sdst-": ("sdst", {"direction": "-"}),
    "mist-sem": ("mist", {"mode": "sem"}),
    "mist-tex": ("mist", {"mode": "tex"}),
    "mist-joint": ("mist", {"mode": "joint"}),
    "photoguard-enc": ("photoguard_enc", {}),
    "ti-aspl": ("aspl", {"inner": "ti"}),
    "adaptive-szt": ("adaptive_szt", {}),
    "adaptive-szt-ti": (
        "aspl",
        {
            "inner": "ti",
            "defended": True,
            "eot": ("jpeg",),
            "jpeg_qualities": (25, 50, 75, 90),
            "t_range": (500, 1000),
            "mask": "loss",
        },
    ),
}
"""Method names that stand for a method and some settings of it."""


def levels(radius: str, low: int, high: int) -> float:
    """8-bit levels of a radius such as "0.05" or "16/255" on pixels in [low, high], exactly."""
    over, _, under = radius.partition("/")
    return float(Fraction(over) / Fraction(under or "1") * 255 / (high - low))


@dataclass(frozen=True)
class Preset:
    """A method's settings in published code: radius and step as written there, on pixels in [low, high]."""

    method: str | None
    radius: str
    low: int
    high: int
    step: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> dict[str, Any]:
        """Settings in levels."""
        out = {"eps_levels": levels(self.radius, self.low, self.high), **self.settings}
        if self.step is not None:
            out["step_levels"] = levels(self.step, self.low, self.high)
        return out


_DREAMBOOTH = {"prompt": "a photo of {}", "subject": "sks person", "lr": 5e-7}

PRESETS: Mapping[str, Preset] = {
    "mist": Preset("mist", "32/255", -1, 1, "2/255", {"steps": 100}),
    "diff-protect-advdm": Preset("advdm", "32/255", -1, 1, "2/255", {"steps": 100}),
    "diff-protect-sds": Preset("sds", "32/255", -1, 1, "2/255", {"steps": 100, "direction": "-"}),
    "diff-protect-sdst": Preset("sdst", "32/255", -1, 1, "2/255", {"steps": 100, "direction": "-"}),
    "anti-dreambooth": Preset(
        "aspl", "0.05", -1, 1, "0.005", {"steps": 300, "pgd_steps": 6, "inner_steps": 3, **_DREAMBOOTH}
    ),
    "anti-dreambooth-fsmg": Preset(
        "fsmg", "0.05", -1, 1, "0.005", {"steps": 100, "surrogate_steps": 1000, **_DREAMBOOTH}
    ),
    "simac-aspl": Preset(
        "aspl", "16/255", -1, 1, "0.005", {"steps": 300, "pgd_steps": 6, "inner_steps": 3, **_DREAMBOOTH}
    ),
    "photoguard": Preset(
        "photoguard_enc", "0.06", -1, 1, "0.02", {"steps": 1000, "final_step": 0.01, "toward": "zero"}
    ),
    "photoguard-demo": Preset(
        "photoguard_enc", "0.12", -1, 1, "0.01", {"steps": 200, "final_step": 0.01, "toward": "grey"}
    ),
    "pid": Preset("pid", "12.75/255", 0, 1, "1/255", {"steps": 1000}),
    "metacloak": Preset(None, "11", 0, 255),
    "mist-v2": Preset(None, "0.04", -1, 1),
    "caat": Preset(None, "0.05", -1, 1, "0.005"),
}
"""Published settings. Without a method only the radius is of use: give it with another method."""


def resolve(method: str | None, preset: str | None, given: Mapping[str, Any]) -> tuple[type, Any]:
    """(class, checked Config) of a method as people write it, a preset's settings, and settings that override both.

    Raises ConfigError for unknown names with the nearest known one, and for a preset of another method.
    """
    settings: dict[str, Any] = {}
    found = None
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(
                f"{preset!r} is not a preset.{suggest(preset, list(PRESETS))}  Known: {', '.join(PRESETS)}"
            )
        found = PRESETS[preset]
        settings, method = found.resolved(), method or found.method
        if method is None:
            raise ConfigError(
                f"preset {preset} is a radius only ({settings['eps_levels']:g} levels): name a method too."
            )
    if method is None:
        raise ConfigError(f"no method was named. Known: {', '.join(known_methods())}")
    name, spelled = SPELLINGS.get(method, (method, {}))
    if name not in POISONS.names():
        raise ConfigError(
            f"{method!r} is not a diffusion poison.{suggest(method, known_methods())}  "
            f"Known: {', '.join(known_methods())}"
        )
    if found is not None and found.method not in (None, name):
        raise ConfigError(
            f"preset {preset} belongs to {found.method}, and {method} was asked for. Leave one of them out."
        )
    cls: Any = POISONS.get(name)
    checker = Checker(Tree())
    config = checker.settings(cls.Config, (), {**settings, **spelled, **given}, owner=name)
    checker.finish()
    return cls, config


def known_methods() -> list[str]:
    """Every spelling, sorted."""
    return sorted({*POISONS.names(), *SPELLINGS})

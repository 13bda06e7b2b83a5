"""Radii of published code in levels, and the names that people write."""

import pytest

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.attack.presets import PRESETS, SPELLINGS, known_methods, levels, resolve


@pytest.mark.parametrize(
    ("radius", "low", "high", "wanted"),
    [
        ("0.05", -1, 1, 6.375),
        ("16/255", -1, 1, 8.0),
        ("16/255", 0, 1, 16.0),
        ("12.75/255", 0, 1, 12.75),
        ("11", 0, 255, 11.0),
        ("0.06", -1, 1, 7.65),
        ("0.12", -1, 1, 15.3),
        ("0.04", -1, 1, 5.1),
        ("8/255", -1, 1, 4.0),
        ("32/255", -1, 1, 16.0),
    ],
)
def test_radii_become_levels_exactly(radius, low, high, wanted):
    assert levels(radius, low, high) == wanted


@pytest.mark.parametrize(
    ("preset", "method", "eps", "step"),
    [
        ("mist", "mist", 16.0, 1.0),
        ("diff-protect-sds", "sds", 16.0, 1.0),
        ("anti-dreambooth", "aspl", 6.375, 0.6375),
        ("anti-dreambooth-fsmg", "fsmg", 6.375, 0.6375),
        ("simac-aspl", "aspl", 8.0, 0.6375),
        ("photoguard", "photoguard_enc", 7.65, 2.55),
        ("photoguard-demo", "photoguard_enc", 15.3, 1.275),
        ("pid", "pid", 12.75, 1.0),
    ],
)
def test_presets_resolve_to_settings(preset, method, eps, step):
    cls, config = resolve(None, preset, {})
    assert (cls.name, config.eps_levels, config.step_levels) == (method, eps, step)


def test_every_spelling_and_preset_resolves():
    for method in known_methods():
        assert resolve(method, None, {})[0].name == SPELLINGS.get(method, (method,))[0]
    for name, preset in PRESETS.items():
        assert resolve(preset.method or "advdm", name, {})[1].eps_levels == preset.resolved()["eps_levels"]
    assert resolve("advdm-", None, {})[1].direction == "-"
    assert resolve(None, "mist", {"eps_levels": 4})[1].eps_levels == 4


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean advdm"):
        resolve("advdn", None, {})
    with pytest.raises(ConfigError, match="Did you mean mist"):
        resolve(None, "misst", {})
    with pytest.raises(ConfigError, match="belongs to mist"):
        resolve("advdm", "mist", {})
    with pytest.raises(ConfigError, match="name a method too"):
        resolve(None, "metacloak", {})
    with pytest.raises(ConfigError, match="no method"):
        resolve(None, None, {})
    with pytest.raises(ConfigError, match="Did you mean step_levels|not a setting of advdm"):
        resolve("advdm", None, {"step_sise": 1})

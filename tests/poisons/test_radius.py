"""A radius: what rounding adds to it, and samples scaled to it, against plain loops."""

import math

import pytest
import torch

from poisonshield.poisons.base import Radius


def test_levels_become_pixel_units():
    assert Radius.of_levels("linf", 8) == Radius("linf", 8 / 255)
    assert Radius.of_levels("rms", 2).describe() == {"norm": "rms", "radius": 2 / 255, "unit": "pixel units"}
    assert Radius("l0", 3).unit == "pixels"


@pytest.mark.parametrize(("norm", "more"), [("linf", 0.5), ("rms", 0.5), ("l2", 0.5 * math.sqrt(12)), ("l0", 0.0)])
def test_rounding_adds_half_a_level_a_value(norm, more):
    assert Radius(norm, 1.0).after_rounding(12) == pytest.approx(1.0 + more / 255)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_samples_fill_their_radius(norm):
    delta = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    filled = Radius(norm, 0.25).fill(delta)
    for before, after in zip(delta.double(), filled.double(), strict=True):
        values = [abs(float(v)) for v in before.flatten()]
        size = max(values) if norm == "linf" else math.sqrt(sum(v * v for v in values))
        assert torch.allclose(after, before * 0.25 / size, atol=1e-7)

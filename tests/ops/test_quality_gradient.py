"""What the gradient of a JPEG quality says: the sign of the trend with "ste" and "fourier", not with "poly"."""

import pytest
import torch
import torch.nn.functional as F

from poisonshield.ops import jpeg


def picture(seed):
    """Smooth colours with a little noise, as photographs have them."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=64, mode="bicubic").clamp(0, 1)
    return (x * 0.8 + 0.1 + 0.05 * torch.randn(1, 3, 64, 64, generator=generator)).clamp(0, 1)


PROBES = [(seed, quality) for seed in (0, 1) for quality in (30.0, 60.0, 85.0)]


def right(rounding):
    """Of six probes, those where the error's gradient has the sign of its change from five below to five above."""
    found = 0
    for seed, value in PROBES:
        x = picture(seed)
        error = lambda out, x=x: (out - x).square().mean()  # noqa: E731
        quality = torch.tensor([value], requires_grad=True)
        error(jpeg(x, quality, rounding=rounding)).backward()
        trend = error(jpeg(x, value + 5, rounding="hard")) - error(jpeg(x, value - 5, rounding="hard"))
        assert trend < 0  # a file of higher quality is nearer
        found += int(quality.grad.item() * trend.item() > 0)
    return found


@pytest.mark.parametrize("rounding", ["ste", "fourier"])
def test_roundings_that_the_docs_name_for_learning_a_quality_follow_the_trend(rounding):
    assert right(rounding) == len(PROBES)


@pytest.mark.parametrize("rounding", ["poly", "poly_ste", "none"])
def test_roundings_that_the_docs_warn_of_do_not(rounding):
    """D: quality gradient of `jpeg`, rounding "poly": mostly against the trend, and jpeg's docstring says so."""
    assert right(rounding) <= 2
    assert '"poly" and "poly_ste" mostly has the opposite one' in jpeg.__doc__

"""8-bit levels where pixel units are meant: radii and pixels in another space are refused, on the CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from poisonshield.attacks import L2, Linf
from poisonshield.errors import BudgetError, GradientError, ShapeError
from poisonshield.ops import JPEG, jpeg, jpeg_coefficients, pgd_random_start_, pgd_step_

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
G = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def step(**settings):
    return pgd_step_(X.clone(), G, X, **{"step_size": 0.1, "eps": 0.1, **settings})


def test_a_radius_in_levels_is_refused_with_the_way_out():
    """A: `pgd_step_(..., eps=8)`."""
    with pytest.raises(BudgetError, match=r"eps 8 reaches beyond the clip.* 1 at most. Did you mean 8/255\?"):
        step(eps=8)
    for refused in ({"step_size": 4}, {"eps": torch.tensor([0.1, 8.0])}, {"eps": float("inf")}, {"eps": 1.01}):
        with pytest.raises(BudgetError, match="reaches beyond the clip"):
            step(**refused)
    with pytest.raises(BudgetError, match=r"eps 8 .* Did you mean 8/255\?"):
        pgd_random_start_(X.clone(), X, eps=8, seed=0)
    with pytest.raises(BudgetError, match=r"128/255"):
        step(norm="l2", eps=128)  # longer than the diagonal of the whole cube


@pytest.mark.parametrize(
    "allowed",
    [
        {"eps": 1, "step_size": 2},
        {"eps": 8, "step_size": 2, "norm": "l2"},  # eight is an ordinary Euclidean radius
        {"eps": 8, "step_size": 2, "clip": (0, 255)},
        {"eps": 8, "step_size": float("inf"), "clip": (-float("inf"), float("inf"))},
        {"eps": 1, "mean": MEAN, "std": STD},
        {"eps": torch.tensor(8 / 255)},
    ],
)
def test_radii_that_fit_the_clip_are_taken(allowed):
    assert step(**allowed).isfinite().all() or allowed["step_size"] == float("inf")


@pytest.mark.parametrize("call", [JPEG(50), lambda x: jpeg(x, 50), lambda x: jpeg_coefficients(x, 50)])
def test_pixels_in_another_space_are_refused_with_the_way_out(call):
    """A: `JPEG(...)(x * 255)`; normalized pixels too, and both in channels-last memory."""
    normalized = (X - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    for x, words in ((X * 255, "Divide 8-bit levels by 255"), (normalized, "Normalize inside the model, or say how")):
        for layout in (torch.contiguous_format, torch.channels_last):
            with pytest.raises(ShapeError, match=rf"x reaches from .* are in \(0, 1\)[^!]*{words}"):
                call(x.to(memory_format=layout))


def test_pixels_that_say_what_they_are_or_lie_a_little_outside_are_taken():
    normalized = (X - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    assert jpeg(normalized, 50, mean=MEAN, std=STD).isfinite().all()
    assert jpeg(X * 255, 50, value_range=(0, 255)).isfinite().all()
    assert jpeg(X * 2 - 1, 50, value_range=(-1, 1)).isfinite().all()
    assert torch.equal(JPEG(50, check=False)(X * 255).clamp(0, 1), jpeg(X * 255, 50, check=False))
    assert jpeg(X + 0.2 * G, 50).isfinite().all()  # noise is clamped
    assert jpeg((X * 255).round().to(torch.uint8), 50, mode="exact").dtype == torch.uint8
    with_nan = X.clone()
    with_nan[0, 0, 0, 0] = float("nan")
    assert jpeg(with_nan, 50)[1].isfinite().all()


def test_fake_and_meta_tensors_are_not_looked_at():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8)
        assert jpeg(x, 50).shape == x.shape and jpeg(x, torch.tensor([50.0, 60.0])).shape == x.shape
        assert pgd_step_(x, torch.empty_like(x), torch.empty_like(x), step_size=0.1, eps=0.1) is x
    assert jpeg(X.to("meta"), 50).device.type == "meta"


def test_a_budget_in_levels_is_refused_where_it_is_made():
    with pytest.raises(BudgetError, match=r"eps 8 .* Did you mean 8/255\?"):
        Linf(8)
    assert L2(8).eps == 8 and Linf(1).eps == 1


@pytest.mark.parametrize("name", ["eps", "step_size"])
def test_a_radius_that_gets_no_gradient_may_not_require_one(name):
    with pytest.raises(GradientError, match=f"{name} requires gradients"):
        step(**{name: torch.tensor(0.1, requires_grad=True)})
    with torch.no_grad():
        step(**{name: torch.tensor(0.1, requires_grad=True)})

"""torch.export with a dynamic batch: one program for every batch size, and the same numbers as the plain call."""

import pytest
import torch
from torch.export import Dim, export

from poisonshield.ops import (
    JPEG,
    jpeg,
    jpeg_coefficients,
    masked_diffusion_loss,
    pgd_random_start_,
    pgd_step_,
    q_sample,
)

ALPHAS = torch.linspace(0.99, 0.1, 20)
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])


def pixels(b):
    return torch.rand(b, 3, 12, 9)


def steps(b):
    return torch.arange(b) % 20


def move(x, g, clean, **settings):
    return pgd_step_(x.clone(), g, clean, **{"step_size": 0.1, "eps": 0.1, **settings})


# The call, and what makes its arguments of a batch size.
CASES = {
    "jpeg": (lambda x: jpeg(x, 50), [pixels]),
    "jpeg with a quality each": (lambda x, q: jpeg(x, q), [pixels, lambda b: torch.arange(b) * 3.0 + 30]),
    "jpeg exact": (lambda x: jpeg(x, 50, mode="exact"), [pixels]),
    "jpeg normalized": (lambda x: jpeg(x, 50, mean=MEAN, std=STD), [pixels]),
    "jpeg coefficients": (lambda x: jpeg_coefficients(x, 50), [pixels]),
    "JPEG": (lambda x: JPEG(50)(x), [pixels]),
    "JPEG of random quality": (lambda x: JPEG((30, 60), p=0.5)(x), [pixels]),
    "pgd_step_": (move, [pixels] * 3),
    "pgd_step_ in place": (lambda x, g, c: pgd_step_(x, g, c, step_size=0.1, eps=0.1), [pixels] * 3),
    "pgd_step_ l2": (lambda x, g, c: move(x, g, c, norm="l2"), [pixels] * 3),
    "pgd_step_ with a radius each": (
        lambda x, g, c, e: move(x, g, c, eps=e),
        [pixels, pixels, pixels, lambda b: torch.arange(b) / 20 + 0.1],
    ),
    "pgd_random_start_": (lambda c: pgd_random_start_(c.clone(), c, eps=0.1, seed=1), [pixels]),
    "q_sample": (lambda x, t: q_sample(x, t, ALPHAS, seed=1)[0], [pixels, steps]),
    "masked_diffusion_loss": (
        lambda x, y, m: masked_diffusion_loss(x, target=y, mask=m),
        [pixels, pixels, lambda b: torch.ones(b, 1, 12, 9)],
    ),
    "masked_diffusion_loss, a sum": (
        lambda x, t: masked_diffusion_loss(
            x, x0=x, seed=1, t=t, alphas_cumprod=ALPHAS, prediction_type="v", reduction="sum", weight="min_snr"
        ),
        [pixels, steps],
    ),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def outputs(function, arguments):
    torch.manual_seed(0)
    out = function(*(a.clone() for a in arguments))
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@pytest.mark.parametrize("name", CASES)
def test_a_program_with_a_dynamic_batch_serves_every_batch_size(name, strict):
    """D: `torch.export` with a dynamic batch of `jpeg`, `pgd_step_`."""
    function, makers = CASES[name]
    batch = Dim("batch", min=1, max=64)
    arguments = tuple(make(4) for make in makers)
    shapes = (tuple({0: batch} for _ in makers),)
    program = export(Module(function), arguments, dynamic_shapes=shapes, strict=strict)
    for size in (1, 4, 7):
        arguments = tuple(make(size) for make in makers)
        for theirs, ours in zip(outputs(program.module(), arguments), outputs(function, arguments), strict=True):
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_height_and_width_may_be_dynamic_too(strict):
    shapes = (({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),)
    program = export(Module(lambda x: jpeg(x, 50)), (torch.rand(2, 3, 16, 24),), dynamic_shapes=shapes, strict=strict)
    for shape in ((3, 3, 17, 40), (5, 3, 33, 9)):
        x = torch.rand(shape)
        assert torch.equal(program.module()(x), jpeg(x, 50))

"""Local Lipschitz constants of linear maps, whose true value lies in a corner of the ball; what must stay untouched."""

import itertools

import numpy
import pytest
import torch
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield.batch import Batch
from poisonshield.evals.lipschitz import local_lipschitz, ratio


class Linear(nn.Module):
    """f(x) = W x on [B, 3, 1, 2]."""

    def __init__(self, out, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(out, 6, generator=generator))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def corners(weight):
    """max over sign vectors s of |W s|_1, which is the ratio's maximum over any linf ball."""
    matrix = weight.detach().double().numpy()
    return max(numpy.abs(matrix @ numpy.array(s)).sum() for s in itertools.product((-1.0, 1.0), repeat=6))


def grey(count=5):
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(count, 3, 1, 2, generator=generator)
    return Batch(tuple(f"k{i}" for i in range(count)), x, y=torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("out", [1, 3])
def test_linear_map_comes_to_its_best_corner(out):
    encoder = Linear(out)
    found = local_lipschitz(encoder, [grey()], eps=0.05, steps=200, step_size=0.0005, restarts=4)
    # float32 differences of features around 1 over a distance of 0.05 are good to about 1e-5.
    assert found <= corners(encoder.weight) * (1 + 1e-4)
    # The ratio's own gradient pulls the largest change in, so changes settle within a step (1 % of eps) of each other.
    assert found == pytest.approx(corners(encoder.weight), rel=1e-2)


def test_pixel_units_scaling_the_input_inside_the_model_scales_the_constant():
    class Scaled(Linear):
        def forward(self, x):
            return super().forward(x / 0.25)

    settings = {"eps": 0.05, "steps": 10, "step_size": 0.01, "restarts": 2}
    plain, scaled = (local_lipschitz(cls(1), [grey()], **settings) for cls in (Linear, Scaled))
    assert scaled == pytest.approx(4 * plain, rel=1e-3)


def test_normalized_features_ignore_length():
    # One feature has no direction but its sign; a feature vector that only grows has a constant direction.
    encoder = Linear(1)
    encoder.weight.data.abs_()
    settings = {"eps": 0.05, "steps": 5, "step_size": 0.02, "restarts": 2}
    assert local_lipschitz(encoder, [grey()], normalize=True, **settings) == pytest.approx(0.0, abs=1e-6)
    assert local_lipschitz(encoder, [grey()], **settings) > 1


def test_more_restarts_and_steps_never_find_less():
    encoder, batch = tiny_encoder(), tiny_batch()
    few = local_lipschitz(encoder, [batch], steps=2, restarts=1)
    assert few <= local_lipschitz(encoder, [batch], steps=6, restarts=1)
    assert few <= local_lipschitz(encoder, [batch], steps=2, restarts=3)


def test_it_beats_random_points_of_the_ball():
    encoder, batch = tiny_encoder().eval(), tiny_batch()
    best = torch.zeros(6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(200):
            x = (batch.x + (torch.rand(batch.x.shape, generator=generator) * 2 - 1) * 4 / 255).clamp(0, 1)
            best = best.maximum(ratio(encoder(batch.x), encoder(x), batch.x, x))
    assert local_lipschitz(encoder, [batch]) > float(best.mean())


def test_ratio_equals_a_loop():
    h, other = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, other_x = torch.rand(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, value in enumerate(ratio(h, other, x, other_x).tolist()):
        top = sum(abs(p - q) for p, q in zip(h[i].tolist(), other[i].tolist(), strict=True))
        bottom = max(abs(p - q) for p, q in zip(x[i].flatten().tolist(), other_x[i].flatten().tolist(), strict=True))
        assert value == pytest.approx(top / bottom, rel=1e-12)
    assert ratio(h, h, x, x).tolist() == [0.0] * 4


def test_value_depends_on_seed_and_key_and_not_on_batches():
    encoder, batch = tiny_encoder(), tiny_batch()
    halves = [
        batch.replace(keys=batch.keys[i : i + 3], x=batch.x[i : i + 3], y=batch.y[i : i + 3], views=None)
        for i in (3, 0)
    ]
    settings = {"steps": 3, "restarts": 2}
    whole = local_lipschitz(encoder, [batch], seed=1, **settings)
    assert local_lipschitz(encoder, halves, seed=1, **settings) == pytest.approx(whole, rel=1e-4)
    assert local_lipschitz(encoder, [batch], seed=1, **settings) == whole
    assert local_lipschitz(encoder, [batch], seed=2, **settings) != whole


def test_nothing_of_the_model_or_the_batch_changes():
    encoder, batch = tiny_encoder().train(), tiny_batch()
    encoder.net[1].eval()
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    x, random = batch.x.clone(), torch.get_rng_state()
    local_lipschitz(encoder, [batch], steps=2, restarts=2)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert encoder.training and not encoder.net[1].training and encoder.net[4].training
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert torch.equal(batch.x, x) and torch.equal(torch.get_rng_state(), random)

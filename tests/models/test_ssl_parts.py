"""Projectors, predictors, the optimal predictor and the momentum target, against the table and slow forms."""

import copy

import pytest
import torch
from dist import run_dist
from losses.golden import golden
from tiny import tiny_encoder
from torch import nn

from poisonshield import collectives
from poisonshield.models.directset import DirectSet, optimal_weight
from poisonshield.models.heads import ProjectorConfig, build_projector
from poisonshield.models.predictors import PredictorConfig, build_predictor
from poisonshield.models.target import Target, TargetConfig

E, H, O, P, BOTTLENECK = 5, 7, 6, 4, 3  # noqa: E741 - the table's letters
PARAMETERS = {  # weights, then what batch norms and biases add, written out from the table
    "moco": E * H + H * H + H * O + 2 * H + 2 * H,
    "simsiam": E * E + E * E + E * O + 2 * E + 2 * E,
    "byol": E * H + H * O + 2 * H,
    "vicreg": E * H + H * H + H * O + 2 * H + 2 * H,
    "dino_cnn": E * H + H + H * H + H + H * BOTTLENECK + BOTTLENECK + BOTTLENECK * O + 2 * H + 2 * H,
    "dino_vit": E * H + H + H * H + H + H * BOTTLENECK + BOTTLENECK + BOTTLENECK * O,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_projectors_have_the_tables_layers(name):
    head = build_projector(ProjectorConfig(projector=name, hidden=H, out=O, bottleneck=BOTTLENECK), E)
    assert sum(p.numel() for p in head.parameters()) == PARAMETERS[name]
    assert head(torch.randn(8, E)).shape == (8, O)
    ends_normed = isinstance(head[-1], nn.BatchNorm1d) and not head[-1].affine
    assert ends_normed == (name in ("moco", "simsiam"))


def test_dino_prototypes_are_cosines():
    head = build_projector(ProjectorConfig(projector="dino_vit", hidden=H, out=O, bottleneck=BOTTLENECK), E)
    out = head(100 * torch.randn(8, E))
    assert out.abs().max() <= 1 + 1e-6


def test_learned_predictor_has_the_tables_layers():
    predictor = build_predictor(PredictorConfig(predictor=P), O)
    assert sum(p.numel() for p in predictor.parameters()) == O * P + 2 * P + P * O + O
    views = tuple(torch.randn(8, O) for _ in range(3))
    assert [v.shape for v in predictor(views, None)] == [(8, O)] * 3


def test_optimal_predictor_matches_the_golden_values():
    z = golden(1)[0][0]
    directset = DirectSet(6).double()
    (p,) = directset((z,), None)
    assert directset.weight[0, 0].item() == pytest.approx(0.716846987, abs=1e-6)
    assert directset.weight.trace().item() == pytest.approx(4.384233425, abs=1e-6)
    assert p.norm().item() == pytest.approx(4.117387697, abs=1e-6)


def test_optimal_predictor_averages_over_steps_and_rests_in_evaluation():
    a, b = (torch.randn(20, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    directset = DirectSet(4, momentum=0.5)
    directset((a,), None)
    directset((a, b), None)
    first, second = a.T @ a / 20, torch.cat([a, b]).T @ torch.cat([a, b]) / 40
    torch.testing.assert_close(directset.correlation, 0.5 * first + 0.5 * second)
    weight = optimal_weight(directset.correlation, exponent=0.5, offset=0.3)
    torch.testing.assert_close(directset.weight, weight)
    before = copy.deepcopy(directset.state_dict())
    directset.eval()((b,), None)
    assert all(torch.equal(v, before[k]) for k, v in directset.state_dict().items())


def test_optimal_predictor_runs_in_half_precision_and_stops_its_own_gradient():
    z = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (p,) = DirectSet(4)((z.bfloat16(),), None)
    assert p.dtype == torch.float32
    directset = DirectSet(4)
    (p,) = directset((z,), None)
    (grad,) = torch.autograd.grad(p.sum(), z)
    torch.testing.assert_close(grad, directset.weight.sum(1).expand(8, 4))


def directset_over_ranks(rank, world):
    z = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    sizes = (12,) if world == 1 else (7, 5)
    directset = DirectSet(4)
    directset((z[sum(sizes[:rank]) :][: sizes[rank]],), sizes)
    return directset.weight.tolist(), collectives.world_size()


@pytest.mark.dist
def test_optimal_predictor_sees_the_global_batch():
    (one, _), ((a, world), (b, _)) = directset_over_ranks(0, 1), run_dist(directset_over_ranks, 2)
    assert world == 2 and a == b
    torch.testing.assert_close(torch.tensor(a), torch.tensor(one), atol=1e-5, rtol=1e-5)


def test_target_starts_as_a_copy_and_follows_slowly():
    online = tiny_encoder()
    target = Target(TargetConfig(momentum=0.9), online)
    before = [p.clone() for p in target.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, online.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    target.follow(online, progress=0.5)
    for p, old in zip(target.parameters(), before, strict=True):
        torch.testing.assert_close(p, old + 0.1)


def test_target_may_start_at_random():
    online = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.manual_seed(0)
    target = Target(TargetConfig(start="random"), online)
    assert not torch.equal(target.parts[0][0].weight, online[0].weight)


def test_cosine_momentum_ends_at_one():
    target = Target(TargetConfig(momentum=0.9, momentum_schedule="cosine"), nn.Linear(2, 2))
    assert target.momentum(1.0) == pytest.approx(1.0)
    assert target.momentum(0.5) == pytest.approx(0.95)
    assert Target(TargetConfig(momentum=0.9), nn.Linear(2, 2)).momentum(1.0) == 0.9


@pytest.mark.parametrize("stopped", [True, False])
def test_targets_gradient_to_the_pixels_is_a_choice(stopped):
    target = Target(TargetConfig(stop_gradient=stopped), tiny_encoder())
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    assert target(x).requires_grad != stopped


def test_optimal_predictor_leaves_bad_batches_to_the_trainer():
    directset, z = DirectSet(4), torch.randn(8, 4)
    directset((z,), None)
    weight = directset.weight.clone()
    (p,) = directset((z * float("nan"),), None)
    assert torch.isnan(p).all() and torch.equal(directset.weight, weight)

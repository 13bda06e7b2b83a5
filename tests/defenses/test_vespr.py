"""VESPR: the fast attack equals the full one, touches nothing, and the joint loss is what the paper writes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dist import run_dist
from tiny import tiny_batch, tiny_encoder
from torch.utils._python_dispatch import TorchDispatchMode

from poisonshield import collectives
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.errors import ConfigError
from poisonshield.losses.infonce import infonce
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised


def joint(**settings):
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=12, out=10), encoder=tiny_encoder(), num_classes=4)
    return VESPR(VESPR.Config(**settings), Context(5, 4)).wrap(method).train()


def full_attack(model, batch, start, *, eps, step, steps, flagged):
    """The reference's attack, slowly: every view, every head, the joint loss 0 * SSL + 1 * CE as a mean over batch and
    views, gradients of all parameters too, evaluation mode. Pixels are kept in [0, 1] as ours are."""
    model = copy.deepcopy(model).eval()
    views = [v.clone() for v in batch.views]
    for i in flagged:
        views[i] = (batch.views[i] + start[i].clamp(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        leaves = [v.clone().requires_grad_() for v in views]
        h = [model.encoder(v) for v in leaves]
        ssl = infonce(tuple(model.method.projector(x) for x in h))
        ce = sum(F.cross_entropy(model.head(x), batch.y) for x in h) / len(h)
        model.zero_grad()
        (0.0 * ssl + 1.0 * ce).backward()
        for i in flagged:
            moved = views[i] + step * leaves[i].grad.sign()
            views[i] = moved.clamp(batch.views[i] - eps, batch.views[i] + eps).clamp(0, 1)
    return views


@pytest.mark.parametrize("flagged", [(0,), (1,), (0, 1)])
def test_fast_attack_equals_the_full_reference_attack(flagged):
    eps, step, steps = 8 / 255, 2 / 255, 10
    model, batch = joint(eps=eps, attack={"steps": steps, "step_size": step}, attack_views=flagged), tiny_batch(16)
    start = {
        i: (batch.random(5).within(f"view{i}").uniform("pgd/start/0", v[0].numel()).view(v.shape) * 2 - 1) * eps
        for i, v in enumerate(batch.views)
        if i in flagged
    }
    slow = full_attack(model, batch, start, eps=eps, step=step, steps=steps, flagged=flagged)
    for i in range(2):
        fast = model.attacked(batch.views[i], i, batch)
        assert (fast != slow[i]).sum() == 0
        assert torch.equal(fast, batch.views[i]) == (i not in flagged)


def attack_without_talking(rank, world):
    """On two ranks: attacked pixels while every collective of torch raises, and with batch norm over ranks."""
    import torch.distributed as dist

    from poisonshield.models.batchnorm import synchronize

    model = synchronize(joint(attack={"steps": 3}), torch.device("cpu"))
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "barrier"))]

    def refuse(*arguments, **settings):
        raise AssertionError("the attack talks to other ranks")

    before = [(dist, n, getattr(dist, n)) for n in names]
    before += [(collectives, n, getattr(collectives, n)) for n in ("_all_gather", "_reduce_scatter")]
    for place, n, _ in before:
        setattr(place, n, refuse)
    try:
        quiet = model.attacked(tiny_batch().views[0], 0, tiny_batch())
        with pytest.raises(AssertionError, match="talks to other ranks"):
            dist.all_reduce(torch.zeros(1))
    finally:
        for place, n, function in before:
            setattr(place, n, function)
    return len(names), quiet.tolist()


@pytest.mark.dist
def test_attack_uses_no_collective():
    (count, one), (_, two) = run_dist(attack_without_talking, 2)
    assert count > 10 and one == two
    assert torch.equal(torch.tensor(one), joint(attack={"steps": 3}).attacked(tiny_batch().views[0], 0, tiny_batch()))


def test_attack_leaves_the_model_and_random_state_alone():
    model, batch = joint(attack={"steps": 3}), tiny_batch()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    model.attacked(batch.views[0], 0, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 7).all() and p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes


class WatchConvolutions(TorchDispatchMode):
    """Counts convolution backwards, and those of them that made a weight gradient."""

    def __init__(self):
        super().__init__()
        self.backwards = self.weight_gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.backwards += 1
            self.weight_gradients += bool(args[-1][1])
        return func(*args, **(kwargs or {}))


def test_attack_makes_no_weight_gradient():
    model, batch = joint(attack={"steps": 3}), tiny_batch()
    with WatchConvolutions() as watch:
        model.attacked(batch.views[0], 0, batch)
    assert (watch.backwards, watch.weight_gradients) == (2 * 3, 0)  # two convolutions, three steps


def test_joint_loss_is_the_papers_sum():
    model, batch = joint(attack={"steps": 2}, eps=4 / 255, ssl_weight=0.5, ce_weight=2.0), tiny_batch()
    other = copy.deepcopy(model)
    out = model(batch)
    views = [other.attacked(batch.views[0], 0, batch), batch.views[1]]
    h = [other.encoder(v) for v in views]
    ssl = infonce(tuple(other.method.projector(x) for x in h))
    ce = (F.cross_entropy(other.head(h[0]), batch.y) + F.cross_entropy(other.head(h[1]), batch.y)) / 2
    torch.testing.assert_close(out.loss, 0.5 * ssl + 2.0 * ce)
    torch.testing.assert_close(out.metrics["ssl"], ssl.detach())
    torch.testing.assert_close(out.metrics["ce"], ce.detach())


def test_without_attacked_views_it_is_joint_training():
    defense = VESPR(VESPR.Config(attack_views=()), Context(0, 4))
    assert defense.label == "ssl+ce"
    model, batch = joint(attack_views=()), tiny_batch()
    assert model.attacked(batch.views[0], 0, batch) is batch.views[0]
    assert torch.isfinite(model(batch).loss)


def test_every_parameter_learns_from_one_step():
    model, batch = joint(attack={"steps": 1}), tiny_batch()
    model(batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_view_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"attack_views \[2\]: simclr has 2 views"):
        joint(attack_views=(0, 2))


def test_supervised_method_is_refused_with_the_way_out():
    method = Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=4)
    with pytest.raises(ConfigError, match="Use method.name: simclr"):
        VESPR(VESPR.Config(), Context(0, 4)).wrap(method)


def test_loss_falls_on_tiny_data():
    model, batch = joint(attack={"steps": 2}, eps=2 / 255), tiny_batch(24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(40):
        out = model(batch.replace(draw=epoch))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

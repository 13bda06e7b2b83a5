"""VESPR's family by settings: joint attacks, clean copies, legacy radius, warm start, early stop, precision."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import tiny_batch, tiny_encoder

from poisonshield.attacks import ClassMemory, Linf
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.errors import ConfigError
from poisonshield.models.normalize import IMAGENET_STD
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify

METHODS = Classify.methods

SMALL = {"hidden": 12, "out": 10, "predictor": 6, "bottleneck": 5}
SSL = [n for n in METHODS.names() if METHODS.get(n).default_views == "ssl"]


def joint(method="simclr", inner=None, **settings):
    cls = METHODS.get(method)
    widths = {k: v for k, v in SMALL.items() if k in cls.Config.model_fields}
    torch.manual_seed(0)
    built = cls(cls.Config(**widths, **(inner or {})), encoder=tiny_encoder(), num_classes=4)
    return VESPR(VESPR.Config(**settings), Context(5, 4)).wrap(built).train()


def test_views_have_names():
    def chosen(value):
        return VESPR.Config(attack_views=value).attack_views

    assert (chosen("none"), chosen("both"), chosen(1), chosen([1, 0])) == ((), (0, 1), (1,), (1, 0))


@pytest.mark.parametrize("method", SSL)
def test_every_method_trains_inside_it(method):
    model, batch = joint(method, attack={"steps": 2}, keep_clean=True), tiny_batch(12)
    out = model(batch)
    out.loss.backward()
    assert torch.isfinite(out.loss) and {"ssl", "ce", "attack_ce_gap", "attack_similarity"} <= set(out.metrics)
    assert model.encoder.net[0].weight.grad.abs().sum() > 0 and model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", SSL)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_joint_attack_leaves_every_state_alone(method, mode):
    """Centres, optimal predictors, targets and batch statistics: the loss is evaluated, and nothing moves."""
    inner = {"directset": 0.5} if method in ("byol", "simsiam", "mec", "moco") else {}
    model = joint(
        method,
        inner,
        attack_ssl_weight=1.0,
        attack_ce_weight=1.0,
        attack_views="both",
        attack={"steps": 2},
        attack_mode=mode,
    )
    batch = tiny_batch(12)
    model(batch)  # so that state is no longer that of construction
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    views = model.attacked_views(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    for v, x in zip(views, batch.views, strict=True):
        assert 0 < (v - x).abs().max() <= 4 / 255 + 1e-7 and v.min() >= 0 and v.max() <= 1


def plain_joint_attack(model, batch, *, eps, step, steps, flagged, ssl, ce):
    """No random start; the joint loss over all views, differentiated as written."""
    model = copy.deepcopy(model).eval()
    views = [v.clone() for v in batch.views]
    for _ in range(steps):
        leaves = [v.clone().requires_grad_() for v in views]
        h = tuple(model.encoder(v) for v in leaves)
        loss = ssl * model.method.loss(h, batch.replace(views=tuple(leaves))).loss
        loss = loss + ce * sum(F.cross_entropy(model.head(x), batch.y) for x in h) / len(h)
        grads = torch.autograd.grad(loss, [leaves[i] for i in flagged])
        for i, g in zip(flagged, grads, strict=True):
            low, high = batch.views[i] - eps, batch.views[i] + eps
            views[i] = torch.minimum(torch.maximum(views[i] + step * g.sign(), low), high).clamp(0, 1)
    return views


@pytest.mark.parametrize(("ssl", "ce"), [(1.0, 0.0), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("flagged", [(0,), (0, 1)])
@pytest.mark.parametrize("method", ["simclr", "barlow", "vicreg"])
def test_joint_attack_ascends_the_weighted_sum(method, flagged, ssl, ce):
    inner = {"symmetrized": True}
    settings = {"eps": 8 / 255, "attack": {"step_size": 4 / 255, "steps": 2, "random_start": False}}
    model = joint(method, inner, attack_views=flagged, attack_ssl_weight=ssl, attack_ce_weight=ce, **settings)
    batch = tiny_batch(8)
    model, batch = model.double(), batch.replace(views=tuple(v.double() for v in batch.views))
    slow = plain_joint_attack(model, batch, eps=8 / 255, step=4 / 255, steps=2, flagged=flagged, ssl=ssl, ce=ce)
    for ours, theirs in zip(model.attacked_views(batch), slow, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_each_loss_may_see_its_own_views():
    batch = tiny_batch(8)
    for ssl_sees, ce_sees in [("attacked", "clean"), ("clean", "attacked")]:
        model = joint(attack={"steps": 2}, ssl_sees=ssl_sees, ce_sees=ce_sees)
        slow = copy.deepcopy(model)
        views = {"attacked": slow.attacked_views(batch), "clean": batch.views}
        ssl = slow.method.loss(tuple(slow.encoder(v) for v in views[ssl_sees]), batch).loss
        ce = sum(F.cross_entropy(slow.head(slow.encoder(v)), batch.y) for v in views[ce_sees]) / 2
        torch.testing.assert_close(model(batch).loss, ssl + ce)


def test_classifier_may_see_the_first_view_alone():
    model, batch = joint(attack_views="none", ce_all_views=False), tiny_batch(8)
    slow = copy.deepcopy(model)
    h = slow.encoder(batch.views[0])
    slow.encoder(batch.views[1])
    torch.testing.assert_close(model(batch).metrics["ce"], F.cross_entropy(slow.head(h), batch.y).detach())


def test_clean_copies_are_further_views_of_the_same_samples():
    model, batch = joint(attack={"steps": 2}, keep_clean=True), tiny_batch(8)
    slow = copy.deepcopy(model)
    views = (*slow.attacked_views(batch), batch.views[0])
    h = tuple(slow.encoder(v) for v in views)
    ce = sum(F.cross_entropy(slow.head(x), batch.y) for x in h) / 3
    torch.testing.assert_close(model(batch).loss, slow.method.loss(h, batch).loss + ce)


def test_stopped_gradient_makes_the_classifier_an_online_probe():
    model, batch = joint(stop_gradient=True, attack_views="none", ssl_weight=0.0), tiny_batch(8)
    model(batch).loss.backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.encoder.net[0].weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stop_gradient": True}, "cannot be attacked"),
        ({"attack_ce_weight": 0.0}, "both 0"),
        ({"attack_views": [0, 0]}, "names a view twice"),
        ({"ssl_sees": "clean", "ce_sees": "clean"}, "no loss sees the attack"),
        ({"stop_loss": 1.0, "attack_ssl_weight": 1.0}, "stop_loss"),
        ({"stop_loss": 1.0, "attack_mode": "train"}, "attack_mode: eval"),
        ({"legacy_scalar_std": 0.226, "norm": "l2"}, "norm: linf"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        VESPR.Config(**settings)


def test_legacy_radius_is_per_channel_and_not_clipped():
    model, batch = joint(legacy_scalar_std=0.226, eps=4 / 255, attack={"step_size": 4 / 255, "steps": 2}), tiny_batch(8)
    x = batch.views[0].clamp(0, 0.001)
    moved = (model.attacked(x, 0, batch) - x).abs().amax((0, 2, 3)) * 255
    radius = torch.tensor([4 * s / 0.226 for s in IMAGENET_STD])
    assert [round(r, 3) for r in radius.tolist()] == [4.053, 3.965, 3.982]
    torch.testing.assert_close(moved, radius, atol=1e-3, rtol=0)
    assert model.attacked(x, 0, batch).min() < 0


def test_samples_above_the_stop_loss_are_attacked_no_further():
    batch = tiny_batch(16)
    none, some = (joint(attack={"steps": 3}, stop_loss=s).attacked(batch.views[0], 0, batch) for s in (1e-6, 1e6))
    full = joint(attack={"steps": 3}).attacked(batch.views[0], 0, batch)
    start = joint(attack={"steps": 0}).attacked(batch.views[0], 0, batch)
    assert torch.equal(some, full) and torch.equal(none, start)
    model = joint(attack={"steps": 6, "step_size": 2 / 255}, stop_loss=1.5, eps=16 / 255)
    with torch.no_grad():
        before = F.cross_entropy(
            model.eval().logits(joint(attack={"steps": 0}, eps=16 / 255).attacked(batch.views[0], 0, batch)),
            batch.y,
            reduction="none",
        )
    assert (before < 1.5).any() and (before >= 1.5).any()
    still = model.train().attacked(batch.views[0], 0, batch) == joint(attack={"steps": 0}, eps=16 / 255).attacked(
        batch.views[0], 0, batch
    )
    assert torch.equal(still.flatten(1).all(1), before >= 1.5)


def test_warm_start_begins_at_the_class_average():
    model, batch = joint(warm_start=True, attack={"steps": 1}), tiny_batch(8)
    assert torch.equal(
        model.attacked(batch.views[0], 0, batch),
        joint(attack={"steps": 1, "random_start": False}).attacked(batch.views[0], 0, batch),
    )
    model(batch)
    assert model.memory.average[0].abs().sum() > 0 and model.memory.average[1].abs().sum() == 0


def test_class_memory_keeps_classes_apart_and_stays_in_the_budget():
    memory, y = ClassMemory(3, 1, keep=0.5), torch.tensor([0, 0, 2])
    delta = torch.stack([torch.full((3, 32, 32), v) for v in (0.02, 0.04, -0.02)])
    memory.remember(0, delta, y)
    for c, value in enumerate((0.015, 0.0, -0.01)):
        torch.testing.assert_close(memory.average[0, c], torch.full((3, 32, 32), value))
    x = torch.full((3, 3, 8, 8), 0.5)
    start = memory.start(0, x, torch.tensor([0, 1, 2]), Linf(0.012))
    torch.testing.assert_close(start[:, 0, 0, 0], torch.tensor([0.512, 0.5, 0.49]))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_inner_loop_has_a_precision_of_its_own(precision):
    batch = tiny_batch(16)
    full = joint(attack={"steps": 1, "random_start": False}).attacked(batch.views[0], 0, batch) - batch.views[0]
    ours = (
        joint(attack={"steps": 1, "random_start": False}, attack_precision=precision).attacked(batch.views[0], 0, batch)
        - batch.views[0]
    )
    agree = (ours.sign() == full.sign()).double().mean().item()
    assert agree == 1 if precision == "fp32" else agree > 0.9


def test_summed_and_scaled_half_precision_gradients_do_not_vanish():
    """The mean over many samples in fp16 loses signs that the scaled sum keeps."""
    batch = tiny_batch(128)
    model = joint().eval()

    def zeros(reduce, dtype):
        leaf = batch.views[0].clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            scores = model.logits(leaf)
        loss = F.cross_entropy(scores.float(), batch.y, reduction="none")
        (grad,) = torch.autograd.grad(reduce(loss), leaf)
        return (grad == 0).double().mean().item()

    mean, scaled = zeros(lambda v: v.mean() / 2, torch.float16), zeros(lambda v: v.sum() * 1024, torch.float16)
    assert scaled <= zeros(lambda v: v.sum(), torch.bfloat16) + 0.01 and scaled < 0.01 and scaled <= mean


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_stay_inside_their_balls(norm):
    model, batch = joint(norm=norm, eps=0.5, attack={"step_size": 0.2, "steps": 4, "restarts": 2}), tiny_batch(8)
    x_adv = model.attacked(batch.views[0], 0, batch)
    size = model.budget.measure(x_adv - batch.views[0])
    assert (size <= 0.5 + 1e-5).all() and (size > 0.1).all() and x_adv.min() >= 0 and x_adv.max() <= 1


def test_joint_attack_may_start_warm_too():
    settings = {"attack_ssl_weight": 1.0, "attack_views": "both"}
    warm, batch = joint(warm_start=True, attack={"steps": 1}, **settings), tiny_batch(8)
    cold = joint(attack={"steps": 1, "random_start": False}, **settings)
    for a, b in zip(warm.attacked_views(batch), cold.attacked_views(batch), strict=True):
        assert torch.equal(a, b)
    warm(batch)
    assert not torch.equal(warm.attacked_views(batch)[0], cold.attacked_views(batch)[0])


def test_attack_in_another_half_precision_leaves_the_step_alone():
    """fp16 inside a bf16 run: weights cast for the attack must not reach the training step."""
    batch = tiny_batch(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = joint(attack_precision="fp16", attack={"steps": 2})(batch).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_diagnostics_compare_with_a_clean_copy_where_all_views_are_attacked():
    small = tiny_batch(8, views=1, side=6).views
    batch = tiny_batch(8)
    batch = batch.replace(views=batch.views + small)
    model = joint(attack_views="both", keep_clean=True, attack={"steps": 2})
    slow = copy.deepcopy(model)
    views = (*slow.attacked_views(batch), batch.views[0], batch.views[1])
    h = [slow.encoder(v) for v in views]
    ce = [F.cross_entropy(slow.head(x), batch.y) for x in h]
    torch.testing.assert_close(model(batch).metrics["attack_ce_gap"], (ce[0] - ce[3]).detach())
    assert "attack_ce_gap" not in joint(attack_views="both", attack={"steps": 2})(batch).metrics


def test_stop_loss_is_refused_where_every_pass_gathers_weights():
    path, deepspeed = (
        Path(__file__).parents[2] / "configs/defend/vespr_cifar10_mini.yaml",
        ["engine.backend=deepspeed", "engine.zero_stage=3"],
    )
    read_experiment(path, deepspeed)
    with pytest.raises(ConfigError, match="stop its attack by itself"):
        read_experiment(path, [*deepspeed, "defenses.0.stop_loss=2.0"])

"""Parameter groups and the optimisers, against their formulas in plain Python numbers."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from poisonshield.engine.optim import OptimConfig, build_optimizer, parameter_groups, set_lr
from poisonshield.errors import ConfigError

GRADIENTS = [(0.5, -2.0), (1.5, 0.25), (-1.0, 4.0), (0.1, 0.0)]
START = (3.0, -1.0)


class Mixed(nn.Module):
    """Weights, a bias, norm parameters, a scalar, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.teacher = nn.Linear(2, 2).requires_grad_(False)


def run(config):
    """The two numbers of START after a step for each pair of GRADIENTS."""
    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([START]))
    optimizer = build_optimizer(module, config)
    for pair in GRADIENTS:
        module.weight.grad = torch.tensor([pair], dtype=torch.float64)
        optimizer.step()
    return module.weight[0].tolist()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_its_formula(momentum, nesterov):
    expected = []
    for w, gradients in zip(START, zip(*GRADIENTS, strict=True), strict=True):
        velocity = None
        for g in gradients:
            g = g + 0.01 * w
            velocity = g if velocity is None else momentum * velocity + g
            w = w - 0.1 * (g + momentum * velocity if nesterov else velocity)
        expected.append(w)
    config = OptimConfig(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    assert run(config) == pytest.approx(expected, abs=1e-12)


def test_adamw_is_its_formula():
    expected = []
    for w, gradients in zip(START, zip(*GRADIENTS, strict=True), strict=True):
        first = second = 0.0
        for t, g in enumerate(gradients, start=1):
            w = w - 0.1 * 0.05 * w  # decay is apart from the gradient
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w - 0.1 * (first / (1 - 0.9**t)) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)
        expected.append(w)
    assert run(OptimConfig(name="adamw", lr=0.1, weight_decay=0.05)) == pytest.approx(expected, abs=1e-12)


def test_one_group_holds_every_trainable_parameter_and_no_frozen_one():
    module = Mixed()
    (group,) = parameter_groups(module, OptimConfig(lr=0.1, weight_decay=0.3))
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(group["params"]) == 5 and group["weight_decay"] == 0.3


def test_norms_and_biases_are_not_decayed_where_excluded():
    module = Mixed()
    decayed, free = parameter_groups(module, OptimConfig(lr=0.1, weight_decay=0.3, exclude_norm_and_bias=True))
    assert [id(p) for p in decayed["params"]] == [id(module.conv.weight)] and decayed["weight_decay"] == 0.3
    without = [module.conv.bias, module.norm.weight, module.norm.bias, module.temperature]
    assert {id(p) for p in free["params"]} == {id(p) for p in without} and free["weight_decay"] == 0.0


def test_group_without_parameters_is_left_out():
    groups = parameter_groups(nn.Linear(2, 2, bias=False), OptimConfig(lr=0.1, exclude_norm_and_bias=True))
    assert [len(g["params"]) for g in groups] == [1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamw", "nesterov": True}, "nesterov needs name: sgd or lars"),
        ({"momentum": 0.0, "nesterov": True}, "a momentum above 0"),
        ({"lr": -0.1}, "greater than or equal to 0"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"name": "lamb"}, "'sgd', 'adamw' or 'lars'"),
        ({"name": "adamw", "legacy": True}, "AdamW would divide LARS's rate of each tensor out again"),
        ({"legacy": True}, "legacy is a form of LARS and does nothing to sgd: set name: lars"),
        ({"name": "lars", "legacy": True, "exclude_norm_and_bias": True}, "legacy: true excludes nothing"),
        ({"learning_rate": 1}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        OptimConfig(**{"lr": 0.1, **settings})


def test_rate_has_no_default():
    with pytest.raises(ValidationError, match="Field required"):
        OptimConfig()


def slow_lars(weights, gradients, *, lr, decay, momentum, nesterov, adapts):
    """Each weight (a list of numbers) after a step for each of its gradients, loops over plain numbers."""
    out = []
    for w, steps, adapted in zip(weights, gradients, adapts, strict=True):
        w, velocity = list(w), [0.0] * len(w)
        for g in steps:
            w_norm, g_norm = math.sqrt(sum(v * v for v in w)), math.sqrt(sum(v * v for v in g))
            if adapted and w_norm != 0 and g_norm != 0:
                rate = 0.001 * w_norm / (g_norm + decay * w_norm + 1e-8)
                g = [(a + decay * b) * rate for a, b in zip(g, w, strict=True)]
            elif not adapted and decay:
                raise AssertionError("what is not adapted is not decayed either")
            velocity = [momentum * v + a for v, a in zip(velocity, g, strict=True)]
            move = [a + momentum * v for a, v in zip(g, velocity, strict=True)] if nesterov else velocity
            w = [b - lr * m for b, m in zip(w, move, strict=True)]
        out.append(w)
    return out


class Four(nn.Module):
    """A matrix, a matrix of zeros, a matrix without gradient, a vector."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"matrix": (3, 4), "zeros": (2, 2), "idle": (2, 3), "vector": (5,)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=draw, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value * 0 if name == "zeros" else value))

    def set_gradients(self, step):
        draw = torch.Generator().manual_seed(step + 1)
        for name, p in self.named_parameters():
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64) * (0 if name == "idle" else 1)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lars_is_its_formula(momentum, nesterov, legacy):
    module, weight_decay = Four(), 0.02
    config = OptimConfig(
        name="lars", lr=3.0, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, legacy=legacy
    )
    start = [p.detach().flatten().tolist() for p in module.parameters()]
    gradients = [[] for _ in start]
    optimizer = build_optimizer(module, config)
    for step in range(5):
        module.set_gradients(step)
        for seen, p in zip(gradients, module.parameters(), strict=True):
            seen.append(p.grad.flatten().tolist())
        before = [p.grad.clone() for p in module.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before, strict=True))
    settings = {"lr": 3.0, "momentum": momentum, "nesterov": nesterov}
    expected = slow_lars(start[:3], gradients[:3], decay=weight_decay, adapts=[True] * 3, **settings)
    expected += slow_lars(start[3:], gradients[3:], decay=weight_decay if legacy else 0.0, adapts=[legacy], **settings)
    for p, values in zip(module.parameters(), expected, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, abs=1e-12)
    assert module.idle.flatten().tolist() == start[2]


def test_lars_goes_on_from_its_saved_state_and_takes_its_rate_from_outside():
    config = OptimConfig(name="lars", lr=1.0, weight_decay=0.01)
    whole, first, second = Four(), Four(), Four()
    optimizers = {m: build_optimizer(m, config) for m in (whole, first, second)}

    def walk(module, steps):
        for step in steps:
            module.set_gradients(step)
            set_lr(optimizers[module], 2.0 / (step + 1))
            optimizers[module].step()

    walk(whole, range(6))
    walk(first, range(3))
    second.load_state_dict(first.state_dict())
    optimizers[second].load_state_dict(optimizers[first].state_dict())
    walk(second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    assert not torch.equal(whole.matrix, first.matrix)


def test_lars_needs_whole_tensors():
    config = OptimConfig(name="lars", lr=1.0)
    config.check_sharding(0)
    with pytest.raises(ConfigError, match="zero_stage 2 cuts them into pieces. Set zero_stage: 0"):
        config.check_sharding(2)
    OptimConfig(lr=1.0).check_sharding(2)


@pytest.mark.parametrize(("lr", "batch_size", "peak"), [(0.5, 128, 0.25), (5.0, 512, 10.0), (0.5, 512, 1.0)])
def test_rate_per_256_samples_becomes_the_peak_of_the_batch(lr, batch_size, peak):
    config = OptimConfig(lr=lr, lr_per_256=True)
    assert config.for_batch(batch_size) == OptimConfig(lr=peak)
    assert OptimConfig(lr=lr).for_batch(batch_size) == OptimConfig(lr=lr)
    with pytest.raises(ConfigError, match="lr is per 256 samples"):
        build_optimizer(nn.Linear(2, 2), config)


class Predicting(nn.Module):
    """An encoder, and a predictor one level down, as a defense wraps a method."""

    def __init__(self):
        super().__init__()
        self.encoder, self.method = nn.Linear(2, 3), nn.Module()
        self.method.predictor, self.method.predictors = nn.Linear(3, 2), nn.Linear(3, 1)


@pytest.mark.parametrize("excluded", [False, True])
def test_predictor_has_its_own_rate_where_asked(excluded):
    module = Predicting()
    config = OptimConfig(lr=0.3, weight_decay=0.1, constant_predictor_lr=True, exclude_norm_and_bias=excluded)
    optimizer = build_optimizer(module, config)
    set_lr(optimizer, 0.01, 0.3)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    expected = {name: 0.3 if "predictor." in name else 0.01 for name, _ in module.named_parameters()}
    assert {name: rates[id(p)] for name, p in module.named_parameters()} == expected
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(module.method.predictor.bias)] == (0.0 if excluded else 0.1)
    set_lr(optimizer, 0.02)
    assert {g["lr"] for g in optimizer.param_groups} == {0.02}


def test_constant_rate_of_a_predictor_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no module `predictor` that is trained"):
        parameter_groups(Mixed(), OptimConfig(lr=0.1, constant_predictor_lr=True))

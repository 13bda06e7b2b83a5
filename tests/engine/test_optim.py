"""Parameter groups and the two optimisers, against their formulas in plain Python numbers."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from poisonshield.engine.optim import OptimConfig, build_optimizer, parameter_groups

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
    for w, gradients in zip(START, zip(*GRADIENTS)):
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
    for w, gradients in zip(START, zip(*GRADIENTS)):
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
        ({"name": "adamw", "nesterov": True}, "nesterov needs name: sgd"),
        ({"momentum": 0.0, "nesterov": True}, "a momentum above 0"),
        ({"lr": -0.1}, "greater than or equal to 0"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"name": "lars"}, "'sgd' or 'adamw'"),
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

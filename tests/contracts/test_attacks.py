"""Every attack that the folder holds, with every norm that it names: newcomers are tested without a line here."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield import attacks
from poisonshield.attacks import ATTACKS, Attack, AttackConfig, frozen_stats
from poisonshield.attacks.parts.budgets import NORMS, budget
from poisonshield.errors import ConfigError
from poisonshield.random import KeyedRandom, sample_ids

EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}
ALL = [(name, norm) for name in ATTACKS.names() for norm in ATTACKS.get(name).norms]
OPTIONS = ("stop_loss", "success")


def make(name, norm="linf", **more):
    """Few steps where it has steps; lengths that suit the norm."""
    cls = ATTACKS.get(name)
    wanted = {"steps": 4} | {key: EPS[norm] / 3 for key in cls.lengths}
    settings = {key: value for key, value in wanted.items() if key in cls.Config.model_fields}
    return cls(cls.Config(**settings), **more)


def without_steps(name):
    """The settings that leave an attack at its start, or None if it always moves."""
    cls = ATTACKS.get(name)
    for settings in ({"steps": 0}, {"step_size": 0.0}):
        try:
            config = cls.Config(**settings)
        except ValidationError:
            continue
        return config
    return None


class Problem:
    """The tiny network with a classifier, a batch, and the cross-entropy of some of its rows."""

    def __init__(self, size=6):
        torch.manual_seed(0)
        self.encoder, self.head, self.batch = tiny_encoder().eval(), nn.Linear(8, 4), tiny_batch(size)
        self.seen = []

    def objective(self, chosen):
        y = self.batch.y[chosen]

        def loss(v, rows=None):
            self.seen.append(torch.is_grad_enabled())
            return F.cross_entropy(self.head(self.encoder(v)), y if rows is None else y[rows], reduction="none")

        return loss

    def run(self, attack, ball, chosen=None, seed=3, **more):
        chosen = list(range(len(self.batch))) if chosen is None else chosen
        rng = KeyedRandom(seed, sample_ids([self.batch.keys[i] for i in chosen]))
        return attack(self.objective(chosen), self.batch.x[chosen], ball, rng, **more)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_class_is_an_attack_named_as_its_file(name):
    cls = ATTACKS.get(name)
    assert issubclass(cls, Attack) and cls.name == name
    assert cls.norms and set(cls.norms) <= set(NORMS) and set(cls.options) <= set(OPTIONS)
    assert set(cls.lengths) <= set(cls.Config.model_fields)
    assert all(field.description for field in cls.Config.model_fields.values())


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_result_is_inside_the_budget_and_the_pixel_range(name, norm):
    problem, ball = Problem(), budget(norm, EPS[norm])
    x_adv = problem.run(make(name, norm), ball)
    assert (ball.measure(x_adv - problem.batch.x) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_objective_rises(name, norm):
    problem, ball = Problem(), budget(norm, EPS[norm])
    loss = problem.objective(range(6))
    assert loss(problem.run(make(name, norm), ball)).mean() > loss(problem.batch.x).mean()


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_same_random_numbers_give_the_same_pixels(name, norm):
    problem, ball = Problem(), budget(norm, EPS[norm])
    assert torch.equal(problem.run(make(name, norm), ball), problem.run(make(name, norm), ball))


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_pixels_follow_the_key_and_neither_order_nor_batch_size(name, norm):
    problem, ball = Problem(), budget(norm, EPS[norm])
    problem.encoder, problem.head = problem.encoder.double(), problem.head.double()
    problem.batch = problem.batch.replace(x=problem.batch.x.double())
    attack = make(name, norm)
    whole = problem.run(attack, ball)
    torch.testing.assert_close(problem.run(attack, ball, [5, 2]), whole[[5, 2]], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_attack_without_a_radius_leaves_the_pixels_alone(name, norm):
    problem = Problem()
    assert torch.allclose(problem.run(make(name, norm), budget(norm, 0.0)), problem.batch.x, atol=1e-7)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_attack_without_a_step_leaves_its_start_alone(name):
    config = without_steps(name)
    if config is None:
        pytest.skip(f"{name} always moves")
    problem, start = Problem(), (Problem().batch.x + 0.01).clamp(0, 1)
    given = start.clone()
    x_adv = problem.run(ATTACKS.get(name)(config), budget("linf", 8 / 255), start=start)
    torch.testing.assert_close(x_adv, start, atol=1e-7, rtol=0)
    assert torch.equal(start, given)


@pytest.mark.parametrize(("name", "norm"), ALL)
def test_inputs_and_start_are_not_changed(name, norm):
    problem, ball = Problem(), budget(norm, EPS[norm])
    x, start = problem.batch.x.clone(), problem.batch.x.clone()
    problem.run(make(name, norm), ball, start=start)
    assert torch.equal(problem.batch.x, x) and torch.equal(start, x)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_no_weight_gradient_is_made_and_nothing_of_the_model_moves(name):
    problem = Problem()
    weights = [*problem.encoder.parameters(), *problem.head.parameters()]
    made = []
    for weight in weights:
        weight.register_hook(made.append)
    before = {key: value.clone() for key, value in problem.encoder.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with frozen_stats(problem.encoder):
        problem.run(make(name), budget("linf", 8 / 255))
    assert not made and all(weight.grad is None for weight in weights)
    assert all(torch.equal(value, before[key]) for key, value in problem.encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_attack_asks_for_no_more_gradients_than_it_says(name):
    problem, attack = Problem(), make(name)
    with torch.no_grad():
        problem.run(attack, budget("linf", 8 / 255))
    assert 0 < sum(problem.seen) <= attack.passes(attack.config)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_scaled_gradient_takes_the_same_steps(name):
    problem, ball = Problem(), budget("linf", 8 / 255)
    assert torch.equal(problem.run(make(name), ball), problem.run(make(name, grad_scale=1024.0), ball))


@pytest.mark.parametrize("name", ATTACKS.names())
def test_norm_that_an_attack_does_not_have_is_refused(name):
    cls = ATTACKS.get(name)

    class Elsewhere(type(budget("linf", 0.1))):
        norm = "l7"

    with pytest.raises(ConfigError, match=f"{name} has no steps for the norm l7; it has them for {cls.norms[0]}"):
        Problem().run(make(name), Elsewhere(0.1))
    for norm in set(NORMS) - set(cls.norms):
        with pytest.raises(ValidationError, match=f"{name} has no steps for the norm {norm}"):
            AttackConfig(norm=norm, attack=name)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_option_that_an_attack_does_not_take_is_refused_and_others_work(name):
    cls, problem, ball = ATTACKS.get(name), Problem(), budget("linf", 8 / 255)
    tried = {
        "stop_loss": lambda: problem.run(make(name, stop_loss=1.0), ball),
        "success": lambda: problem.run(make(name), ball, success=lambda v: v.flatten(1).mean(1) > 2),
    }
    for option, attempt in tried.items():
        if option in cls.options:
            assert attempt().shape == problem.batch.x.shape
        else:
            with pytest.raises(ConfigError, match=f"{name} does not take {option}"):
                attempt()


NEWCOMER = """
from poisonshield.attacks import PGD


class Halfway(PGD):
    name = "halfway"
"""


def test_a_file_in_the_folder_is_an_attack(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text(NEWCOMER)
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    assert "halfway" in ATTACKS.names()
    config = AttackConfig(attack={"name": "halfway", "steps": 3})
    assert config.build_attack().config.steps == 3 and type(config.build_attack()).__name__ == "Halfway"

"""An attack as a block of settings: what it may leave out, and what is refused in which words."""

import pytest
from pydantic import Field

from poisonshield.attacks import APGD, FGSM, PGD, AttackConfig, Linf
from poisonshield.attacks.parts.settings import AttackChoice
from poisonshield.config import Checker, Number, dump, load_tree
from poisonshield.defenses.adversarial import Adversarial
from poisonshield.defenses.vespr import VESPR
from poisonshield.errors import ConfigError


class Slow(AttackConfig):
    """A Config with a default of its own."""

    eps: Number = 4 / 255
    attack: AttackChoice = Field({"name": "pgd", "step_size": 0.6 / 255}, validate_default=True)


def read(tmp_path, text, *overrides):
    """The checked Config, and the tree that it comes from."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    tree = load_tree(path, overrides)
    checker = Checker(tree)
    config = checker.settings(VESPR.Config, (), tree.values, owner="vespr")
    checker.finish()
    return config, tree


def test_defaults_are_those_of_the_two_defenses():
    vespr, adversarial = VESPR.Config(), Adversarial.Config()
    assert (vespr.norm, vespr.eps, vespr.attack.config) == ("linf", 4 / 255, PGD.Config(step_size=0.6 / 255))
    assert (adversarial.norm, adversarial.eps, adversarial.attack.config) == ("linf", 8 / 255, PGD.Config())
    assert (PGD.Config().steps, PGD.Config().step_size) == (10, 2 / 255)


@pytest.mark.parametrize("name", [{}, {"name": "pgd"}])
def test_what_a_block_leaves_out_keeps_the_defaults_value(name):
    config = VESPR.Config(attack={**name, "steps": 5})
    assert config.attack.name == "pgd" and config.attack.config == PGD.Config(steps=5, step_size=0.6 / 255)
    assert VESPR.Config(attack="pgd").attack == VESPR.Config().attack


def test_another_attack_starts_from_its_own_defaults():
    config = VESPR.Config(attack={"name": "fgsm"})
    assert config.attack.cls is FGSM and config.attack.config == FGSM.Config()
    assert VESPR.Config(attack="apgd").attack.config.steps == 100


@pytest.mark.parametrize(
    "text", ["eps: 4/255\n", "attack: {name: pgd, step_size: 1/255}\n", "attack: {steps: 3}\n", "attack: pgd\n"]
)
def test_one_setting_may_be_overridden_whatever_the_file_says(tmp_path, text):
    config, _ = read(tmp_path, text, "attack.steps=5")
    step_size = 1 / 255 if "step_size" in text else 0.6 / 255
    assert config.attack.config == PGD.Config(steps=5, step_size=step_size)


def test_override_keeps_an_attack_that_the_file_names_without_a_block(tmp_path):
    config, _ = read(tmp_path, "attack: apgd\n", "attack.steps=5")
    assert config.attack.config == APGD.Config(steps=5)


def test_record_holds_every_setting_with_fractions_as_written(tmp_path):
    config, tree = read(tmp_path, "attack: {step_size: 1/255}\n")
    written = dump(config, tree.values)
    assert written["attack"] == {
        "name": "pgd", "steps": 10, "step_size": "1/255", "random_start": True, "restarts": 1, "graph": None,
    }  # fmt: skip
    assert VESPR.Config.model_validate(written) == config


@pytest.mark.parametrize("key", ["steps", "step_size", "random_start", "restarts"])
def test_settings_of_earlier_versions_are_told_their_new_name(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"a.yaml:1: {key} is called attack.{key} now. Write that instead."):
        read(tmp_path, f"{key}: 1\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("attack:\n  name: pgd\n  step_sise: 1\n", "a.yaml:3: attack: step_sise is not a setting of pgd. Did you mean"),
        ("attack:\n  name: pgd\n  steps: -1\n", "a.yaml:3: attack: steps: Input should be greater than or equal to 0"),
        ("attack: pgb\n", "a.yaml:1: attack: 'pgb' is not an attack. Did you mean pgd?"),
        ("eps: 4/255\nattack: {step_size: 4}\n", "a.yaml:2: attack: step_size: 4 is outside .* Did you mean 4/255?"),
        ("norm: l1\nattack: apgd\n", "a.yaml:2: attack: apgd has no steps for the norm l1; it has them for linf, l2"),
        ("attack: apgd\nstop_loss: 2\n", "apgd does not take stop_loss .options that it takes: success.. Leave it out"),
        ("attack: apgd\nattack_ssl_weight: 1\n", "apgd follows each sample's own loss"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_line(tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, text)


def test_adversarial_training_without_a_step_is_refused():
    with pytest.raises(ValueError, match="Give attack.steps: 1 or more"):
        Adversarial.Config(attack={"steps": 0})


def test_step_of_a_longer_norm_may_be_longer_than_a_pixel():
    assert VESPR.Config(norm="l2", eps=3, attack={"step_size": 2}).attack.config.step_size == 2


def test_a_subclass_changes_the_default_alone():
    assert Slow().attack.config.step_size == 0.6 / 255 and Slow(attack={"steps": 1}).attack.config.steps == 1


def test_attack_and_budget_are_built_from_the_config():
    config = Slow(attack={"steps": 3})
    attack = config.build_attack(grad_scale=8.0, stop_loss=1.5)
    assert (attack.config, attack.grad_scale, attack.stop_loss) == (config.attack.config, 8.0, 1.5)
    assert config.budget() == Linf(4 / 255)


def test_attacks_are_built_from_a_config_or_from_settings():
    assert PGD(PGD.Config(steps=3)).config == PGD(steps=3).config
    assert repr(PGD(steps=3)) == f"PGD(steps=3, step_size={2 / 255}, random_start=True, restarts=1, graph=None)"
    with pytest.raises(ConfigError, match="PGD was given 10. Give a PGD.Config, or settings by name"):
        PGD(10)
    with pytest.raises(ConfigError, match="a Config and steps too"):
        PGD(PGD.Config(), steps=3)
    with pytest.raises(ValueError, match="step_sise"):
        PGD(step_sise=1)

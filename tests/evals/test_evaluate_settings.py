"""`evaluate:` in a config: what is on by itself, what may be switched, and what settings were once called."""

import pytest
from pydantic import ValidationError

from poisonshield.config import Checker, Tree
from poisonshield.errors import ConfigError
from poisonshield.evals.diffusion.parts.settings import WordEvaluateConfig
from poisonshield.evals.lipschitz import Lipschitz
from poisonshield.evals.pairs import Pairs
from poisonshield.evals.parts.settings import EvaluateConfig

DEFAULTS = {
    "batch_size": 500,
    "watch_pairs": 0,
    "legacy": False,
    "classifier": {},
    "knn": {"k": 20, "weighted": False, "temperature": 0.07},
    "linear": {"weight_decay": 1e-4, "rates": (), "epochs": 100},
    "robust": {
        "norm": "linf",
        "eps": 4 / 255,
        "attack": {
            "name": "pgd",
            "steps": 10,
            "step_size": 1 / 255,
            "random_start": True,
            "restarts": 1,
            "graph": None,
        },
        "loss": "ce",
        "samples": None,
    },
    "spectrum": {},
    "alignment": {"samples": 1000},
    "lipschitz": None,
    "pairs": None,
}
OLD = {
    "knn_k": 20, "knn_weighted": False, "knn_temperature": 0.07, "linear_weight_decay": 1e-4, "linear_rates": [],
    "linear_epochs": 100, "robust_eps": 0.1, "robust_step_size": 0.1, "robust_steps": 10, "robust_restarts": 1,
    "robust_samples": None, "alignment_samples": 1000, "lipschitz_samples": 0, "lipschitz_eps": 0.1,
    "lipschitz_step_size": 0.1, "lipschitz_steps": 10, "lipschitz_restarts": 5, "pair_samples": 0,
}  # fmt: skip


def problems(values):
    checker = Checker(Tree())
    assert checker.settings(EvaluateConfig, ("evaluate",), values, owner="a run") is None
    with pytest.raises(ConfigError) as error:
        checker.finish()
    return str(error.value)


def test_defaults_are_those_of_the_shipped_evaluations():
    found = EvaluateConfig().model_dump()
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


def test_every_setting_of_earlier_versions_is_told_a_name_that_exists():
    told = problems(OLD)
    for old in OLD:
        (new,) = [
            line.split(" is called evaluate.")[1].split(" now")[0] for line in told.splitlines() if f".{old} " in line
        ]
        setting = EvaluateConfig().model_dump() | {"lipschitz": Lipschitz.Config(), "pairs": Pairs.Config()}
        for part in new.split("."):
            setting = dict(setting)
            assert part in setting, new
            setting = setting[part]


def test_steps_of_the_attack_are_its_own_settings_now():
    told = problems({"robust": {"steps": 3, "restarts": 2}})
    for key in ("steps", "restarts"):
        assert f"evaluate.robust.{key} is called evaluate.robust.attack.{key} now." in told


def test_a_typo_in_a_block_and_of_a_block_gets_the_nearest_name():
    told = problems({"knn": {"wieghted": True}})
    assert "evaluate.knn.wieghted is not a setting of evaluate.knn. Did you mean weighted?" in told
    assert "Settings: k, temperature, weighted" in told
    assert "evaluate.robustt is not a setting of a run. Did you mean robust?" in problems({"robustt": {}})


def test_settings_are_frozen_and_ranges_are_checked():
    with pytest.raises(ValidationError):
        EvaluateConfig().knn = None
    assert "evaluate.robust.eps: 4 is outside [0, 1]" in problems({"robust": {"eps": 4}})


def test_words_have_blocks_of_their_own():
    assert set(WordEvaluateConfig.model_fields) >= {"fidelity", "distances", "latent_cosine", "networks", "word"}
    assert WordEvaluateConfig().networks is None
    assert WordEvaluateConfig.model_validate({"networks": {"folders": {"clip": "x"}}}).networks.folders == {"clip": "x"}

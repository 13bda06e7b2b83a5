"""Settings with their words: what is printed reads back as the same settings, and says what each is for."""

import json
from pathlib import Path

import pytest
import yaml

from poisonshield.config import shipped_configs
from poisonshield.config.describe import describe_yaml
from poisonshield.runs import read_experiment

NAMES = [name for name in shipped_configs() if not Path(name).name.startswith("base")]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_the_record(name):
    experiment = read_experiment(name)
    text = experiment.describe_config().partition("\n\n")[0]
    assert yaml.safe_load(text) == json.loads(json.dumps(experiment.record))


def test_every_setting_of_the_small_vespr_config_has_words():
    text = read_experiment("defend/vespr_cifar10_mini").describe_config()
    bare = [line for line in text.splitlines() if "#" not in line and not line.endswith(":")]
    assert not bare, bare


def test_awkward_values_read_back():
    record = {
        "a": "yes",
        "b": [],
        "c": {},
        "d": [{"x": "8/255"}, {"x": None}],
        "e": "a: b # c",
        "f": [1, [2, 3]],
        "g": 1e-05,
    }
    text = describe_yaml(record, {"a": ("Words.", None), "d": ("List.", [{"x": ("Inside.", None)}, None])})
    assert yaml.safe_load(text) == record and "# Words." in text and "# Inside." in text

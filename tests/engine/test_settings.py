"""The `engine:` section: impossible settings are refused with what would be possible."""

import pytest
from pydantic import ValidationError

from poisonshield.engine.settings import EngineConfig, backends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": None}, "how long to train is not said: set epochs or max_steps"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"backend": "deepsped"}, r"'deepsped' is not an engine backend. Did you mean deepspeed\?.*deepspeed, plain"),
        ({"backend": "base"}, "'base' is not an engine backend"),
        ({"zero_stage": 2}, "zero_stage 2 needs backend: deepspeed; plain shards nothing"),
        ({"backend": "deepspeed", "zero_stage": 4}, "less than or equal to 3"),
        ({"backend": "deepspeed", "precision": "bf16"}, "needs zero_stage 1, 2 or 3"),
        ({"backend": "deepspeed", "nonfinite": "skip"}, "nonfinite: skip needs backend: plain"),
        ({"precision": "fp16"}, "'fp32' or 'bf16'"),
        ({"device": "cuda:1"}, "'auto', 'cpu' or 'cuda'"),
        ({"resume": True}, "resume takes false, auto, or the path"),
        ({"resume": ""}, "resume takes false, auto, or the path"),
        ({"keep_checkpoints": 0}, "greater than or equal to 1"),
        ({"log_every_steps": 0}, "greater than or equal to 1"),
        ({"grad_accumulation": 2}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_impossible_setting_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        EngineConfig(**{"epochs": 1, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        *({"backend": "deepspeed", "zero_stage": stage} for stage in range(4)),
        *({"backend": "deepspeed", "zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)),
        {"precision": "bf16", "nonfinite": "skip"},
        {"resume": "auto", "checkpoint_every_steps": None},
        {"resume": "runs/other/checkpoints/step-00000010"},
    ],
    ids=str,
)
def test_possible_settings_are_kept_as_given(settings):
    config = EngineConfig(epochs=1, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_length_is_epochs_or_exactly_max_steps():
    assert EngineConfig(epochs=3).total_steps(7) == 21
    assert EngineConfig(max_steps=5).total_steps(7) == 5
    assert EngineConfig(epochs=3, max_steps=40).total_steps(7) == 40


def test_settings_do_not_change_after_they_are_made():
    with pytest.raises(ValidationError, match="frozen"):
        EngineConfig(epochs=1).epochs = 2


def test_backends_are_the_files_of_the_folder():
    assert backends.names() == ["deepspeed", "plain"]
    assert backends.get("plain").name == "plain"


def test_default_is_the_safe_choice():
    config = EngineConfig(epochs=1)
    assert (config.nonfinite, config.precision, config.resume, config.keep_checkpoints) == ("stop", "fp32", False, 2)

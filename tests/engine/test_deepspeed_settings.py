"""What DeepSpeed is told, and what it is never given."""

import pytest
import torch
from torch import nn

from engine.tiny import TinyMethod
from poisonshield.engine.backends.deepspeed import DeepSpeed, deepspeed_config
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import BackendError


@pytest.mark.parametrize("stage", range(4))
def test_json_for_deepspeed_is_derived_from_our_settings(stage):
    settings = {"backend": "deepspeed", "zero_stage": stage, "precision": "bf16" if stage else "fp32"}
    made = deepspeed_config(EngineConfig(max_steps=1, **settings), OptimConfig(lr=0.1, clip_norm=0.5))
    assert made["zero_optimization"]["stage"] == stage and made["gradient_clipping"] == 0.5
    assert made["torch_autocast"] == {"enabled": stage > 0, "dtype": "bfloat16"}
    assert not {"optimizer", "scheduler", "bf16", "fp16", "train_batch_size"} & set(made)
    without = deepspeed_config(EngineConfig(max_steps=1, **settings), OptimConfig(lr=0.1))
    assert without["gradient_clipping"] == 0.0


def test_parameter_that_deepspeed_cannot_take_is_named():
    method = TinyMethod()
    method.temperature = nn.Parameter(torch.tensor(0.1))
    config = EngineConfig(max_steps=1, backend="deepspeed")
    with pytest.raises(BackendError, match="no parameters without dimensions: temperature of TinyMethod"):
        DeepSpeed(config, OptimConfig(lr=0.1), torch.device("cpu")).prepare(method)

"""Two rates in one run, and LARS, on every backend: two ranks against a loop written out by hand on one."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from engine.tiny import AttackedMethod, TinyStream
from poisonshield import collectives
from poisonshield.batch import StepOutput
from poisonshield.engine.backends.deepspeed import deepspeed_config
from poisonshield.engine.lars import Lars
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.trainer import Trainer
from poisonshield.errors import ConfigError
from poisonshield.runs import read_experiment

STEPS, WARMUP, PEAK = 8, 3, 0.1
CLOSE = 1e-5  # float32 sums in another order
OPTIMIZERS = {
    "predictor": {"lr": PEAK, "weight_decay": 1e-2, "constant_predictor_lr": True, "exclude_norm_and_bias": True},
    "lars": {"name": "lars", "lr": 50 * PEAK, "weight_decay": 1e-2, "legacy": True},
}
BACKENDS = {"plain": {}, **{f"zero{s}": {"backend": "deepspeed", "zero_stage": s} for s in range(4)}}
RUNS = [("predictor", backend) for backend in BACKENDS] + [("lars", "plain"), ("lars", "zero0")]
MINI = Path(__file__).resolve().parents[2] / "configs" / "defend" / "vespr_cifar10_mini.yaml"


class Predicting(AttackedMethod):
    """Also a predictor of features."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Linear(8, 8)

    def forward(self, batch):
        out, h = super().forward(batch), self.encoder(batch.x)
        extra = collectives.mean((self.predictor(h) - h.detach()).pow(2).sum(1), batch.rank_sizes)
        return StepOutput(out.loss + extra, out.metrics)


def parameters(state):
    return {k: v.tolist() for k, v in state.items() if "mean" not in k and "var" not in k and k != "average"}


def run(folder, optimizer, **engine):
    """The parameters after STEPS steps, on rank 0."""
    config = EngineConfig(**{"max_steps": STEPS, "device": "cpu", **engine})
    with processes(config, seed=1):
        torch.manual_seed(1)
        trainer = Trainer(
            Predicting(), TinyStream(), config, optimizer=OptimConfig(**OPTIMIZERS[optimizer]), seed=1,
            schedule=ScheduleConfig(warmup_steps=WARMUP), run_folder=RunFolder(folder), fixed_record={"seed": 1},
        )  # fmt: skip
        trainer.fit()
        return parameters(trainer.state_dict())


def by_hand(optimizer, *, stays=True):
    """The same run written out: cosine for all but the predictor, which stays at the peak once it is reached."""
    torch.manual_seed(1)
    method, stream = Predicting(), iter(TinyStream())
    named = list(method.named_parameters())
    kept = [p for name, p in named if name.startswith("predictor")]
    peak = OPTIMIZERS[optimizer]["lr"]
    if optimizer == "lars":
        step = Lars([p for _, p in named], lr=1.0, weight_decay=1e-2)
    else:
        each = [{"params": [p], "weight_decay": 1e-2 if p.ndim > 1 else 0.0} for _, p in named]
        step = torch.optim.SGD(each, lr=1.0, momentum=0.9)
    for t in range(1, STEPS + 1):
        falling = peak * (1 + math.cos(math.pi * (t - 1) / STEPS)) / 2
        warming = peak * t / WARMUP
        for group in step.param_groups:
            constant = stays and optimizer == "predictor" and any(p is group["params"][0] for p in kept)
            group["lr"] = warming if t < WARMUP else peak if constant else falling
        step.zero_grad()
        method(next(stream)).loss.backward()
        step.step()
        method.after_step(t / STEPS)
    return parameters(method.state_dict())


def two_ranks(rank, world, root):
    """Every run, whole and resumed from its middle."""
    out = {}
    for optimizer, backend in RUNS:
        here, settings = root / optimizer / backend, BACKENDS[backend]
        whole = run(here / "whole", optimizer, checkpoint_every_steps=4, keep_checkpoints=5, **settings)
        middle = str(here / "whole" / "checkpoints" / "step-00000004")
        out[optimizer, backend] = whole, run(here / "resumed", optimizer, resume=middle, **settings)
    return out


@pytest.fixture(scope="module")
def two(ask_two_ranks):
    return ask_two_ranks(__name__).ranks[0]


@pytest.fixture(scope="module")
def hand():
    return {optimizer: by_hand(optimizer) for optimizer in OPTIMIZERS}


def distance(a, b):
    assert a.keys() == b.keys()
    return max((torch.tensor(a[k]) - torch.tensor(b[k])).abs().max().item() for k in a)


@pytest.mark.dist
@pytest.mark.parametrize(("optimizer", "backend"), RUNS)
def test_two_ranks_step_as_the_loop_written_out(two, hand, optimizer, backend):
    whole, resumed = two[optimizer, backend]
    assert distance(whole, hand[optimizer]) < CLOSE
    assert resumed == whole  # bit for bit


def test_predictors_rate_makes_a_difference(hand):
    """So that equality above says something."""
    assert distance(by_hand("predictor", stays=False), hand["predictor"]) > 100 * CLOSE


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lars_on_pieces_of_tensors_is_refused_before_anything_starts(stage):
    overrides = ["optimizer.name=lars", "optimizer.nesterov=false", "optimizer.lr=1", "engine.backend=deepspeed"]
    read_experiment(MINI, [*overrides, "engine.zero_stage=0"])
    with pytest.raises(ConfigError, match=rf"lars measures whole tensors, and engine.zero_stage {stage} cuts them"):
        read_experiment(MINI, [*overrides, f"engine.zero_stage={stage}"])
    with pytest.raises(ConfigError, match="lars measures whole tensors"):
        engine = EngineConfig(max_steps=1, backend="deepspeed", zero_stage=stage)
        deepspeed_config(engine, OptimConfig(name="lars", lr=1))


def test_rate_of_a_predictor_that_the_method_lacks_is_refused_with_its_line():
    with pytest.raises(ConfigError, match="optimizer.constant_predictor_lr: this method has no module `predictor`"):
        read_experiment(MINI, ["optimizer.constant_predictor_lr=true"])
    names = ["method.name=simsiam", "defenses=[]", "optimizer.constant_predictor_lr=true"]
    assert read_experiment(MINI, names).settings.optimizer.constant_predictor_lr


def test_record_keeps_the_rate_as_written_and_reads_back_as_the_same_run(tmp_path):
    run = read_experiment(MINI, ["optimizer.lr_per_256=true", "optimizer.lr=0.4"])
    assert run.settings.optimizer.lr == pytest.approx(0.1) and run.record["optimizer"]["lr"] == 0.4
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(run.record))))
    again = read_experiment(path)
    assert again.record == run.record and again.settings.optimizer == run.settings.optimizer

"""Fine-tuning and linear probing: from a finished run's encoder, whole or with the head alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_encoder

from poisonshield.api import evaluate, train
from poisonshield.defenses.adversarial import Adversarial
from poisonshield.defenses.base import Context
from poisonshield.errors import ConfigError
from poisonshield.methods.supervised import Supervised
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import build_method

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LIGHT = ["engine.device=cpu", "engine.log_every_steps=1", "engine.threads=1", "model.widths=[4,4,4,8]",
         "evaluate.robust=null"]  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A file as a joint run leaves it, and its encoder."""
    encoder = tiny_encoder(seed=7)
    tensors = {f"method.encoder.{k}": v.clone() for k, v in encoder.state_dict().items()}
    file = tmp_path / "method.safetensors"
    save_file(tensors | {"head.weight": torch.ones(4, 8)}, file)
    return file, encoder


def make(file, **settings):
    torch.manual_seed(0)
    method = Supervised(Supervised.Config(init_from=str(file), **settings), encoder=tiny_encoder(), num_classes=4)
    method.initialize()
    return method


def steps(method, count=5):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(count):
        loss = method(tiny_batch(12, views=1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def changed(before, module):
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("frozen", [False, True])
def test_encoder_starts_as_the_finished_one(finished, frozen):
    file, encoder = finished
    assert not changed(encoder.state_dict(), make(file, freeze_encoder=frozen).encoder)


def test_probe_trains_the_head_and_nothing_else(finished):
    """Weights and batch statistics stay through training mode, and features are those of evaluation mode."""
    file, encoder = finished
    method = make(file, freeze_encoder=True).train()
    before, batch = states(method), tiny_batch(12, views=1)
    torch.testing.assert_close(method.features(batch)[0], encoder.eval()(batch.views[0]))
    losses = steps(method)
    assert losses[-1] < losses[0] and changed(before, method) == {"head.weight", "head.bias"}
    assert method.training and method.head.training and not any(m.training for m in method.encoder.modules())
    assert not method.features(batch)[0].requires_grad


def test_finetuning_trains_everything(finished):
    method = make(finished[0]).train()
    before = states(method)
    steps(method)
    assert changed(before, method) == set(before)


def test_probe_is_attacked_through_its_frozen_encoder(finished):
    """Adversarial probing: input gradients pass, and modes come back as they were."""
    defense = Adversarial(Adversarial.Config(attack={"steps": 2}), Context(0, 4))
    method = defense.wrap(make(finished[0], freeze_encoder=True)).train()
    before, batch = states(method), tiny_batch(12, views=1)
    plain = method.method(batch).loss
    assert method(batch).loss > plain + 1e-4
    steps(method)
    assert changed(before, method) == {"method.head.weight", "method.head.bias"}
    assert not any(m.training for m in method.encoder.modules())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"freeze_encoder": True}, "freeze_encoder needs a trained"), ({"branch": "target"}, "branch needs a trained")],
)
def test_nothing_to_start_from_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        Supervised.Config(**settings)


def test_joint_run_is_probed_from_its_folder(tmp_path):
    """VESPR for two steps, then the probe's experiment on what it left; another network is refused before it starts."""
    run = CONFIGS / "defend" / "vespr_cifar10_mini.yaml"
    light = [*LIGHT, "engine.max_steps=2"]
    first = train(run, [*light, f"run.dir={tmp_path / 'joint'}", "method.hidden=8", "method.out=8"])
    probe = CONFIGS / "evaluate" / "linear_probe_cifar10_mini.yaml"
    asked = [*light, f"run.dir={tmp_path / 'probe'}", f"method.init_from={first}"]
    second = train(probe, asked)
    joint, probed = (load_file(f / "export" / "method.safetensors") for f in (first, second))
    encoder = {k.removeprefix("method."): v for k, v in joint.items() if k.startswith("method.encoder.")}
    assert len(encoder) > 20 and all(torch.equal(v, probed[k]) for k, v in encoder.items())
    with pytest.raises(ConfigError, match=r"model.stem_stride 2 \(here 1\)"):
        build_method(read_experiment(probe, [*asked, "model.stem_stride=1"]), 10)
    shutil.rmtree(first)  # a finished probe has its weights, and needs that run no more
    assert evaluate(second)["classifier"]["test_top1"] == pytest.approx(
        json.loads((second / "results.json").read_text())[-1]["test_top1"], abs=0.005
    )


@pytest.mark.parametrize("name", ["linear_probe", "finetune"])
def test_experiments_have_the_authors_rates(name):
    run = read_experiment(CONFIGS / "evaluate" / f"{name}.yaml")
    optimizer, schedule = run.settings.optimizer, run.settings.schedule
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (10.0, 0.9, 0.0)
    assert (run.settings.engine.epochs, run.settings.data.batch_size) == (100, 512)
    assert (schedule.name, schedule.warmup_epochs, schedule.milestones, schedule.gamma) == (
        "step", 10, (0.6, 0.75, 0.9), 0.2)  # fmt: skip
    assert run.method.config.freeze_encoder == (name == "linear_probe")


def test_vespr_presets_have_the_authors_rates():
    large, small = (read_experiment(CONFIGS / "defend" / f"vespr_{name}.yaml") for name in ("in100", "cifar10"))
    assert (large.settings.optimizer.lr, large.settings.data.batch_size, large.settings.engine.epochs) == (
        0.25,
        128,
        200,
    )
    assert (small.settings.optimizer.lr, small.settings.data.batch_size, small.settings.engine.epochs) == (
        1.0,
        512,
        1000,
    )
    assert small.settings.views.size == 28 and small.settings.model.stem_padding == 2
    assert large.record["optimizer"]["lr"] == 0.5 and large.record["optimizer"]["lr_per_256"]
    for run in (large, small):
        s, vespr = run.settings, run.defenses[0].config
        attack = vespr.attack.config
        assert (s.optimizer.name, s.optimizer.momentum, s.optimizer.nesterov) == ("sgd", 0.9, False)
        assert s.optimizer.weight_decay == 1e-4 and not s.optimizer.exclude_norm_and_bias
        assert (s.schedule.name, s.schedule.warmup_epochs, s.schedule.per_epoch) == ("cosine", 10, True)
        assert (attack.steps, vespr.attack_views, vespr.ssl_weight, vespr.ce_weight) == (10, (0,), 1.0, 1.0)
        assert (vespr.eps, attack.step_size) == (pytest.approx(4 / 255), pytest.approx(0.6 / 255))

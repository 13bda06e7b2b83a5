"""Every evaluation of finished runs by the one command: a joint model, plain self-supervision, legacy draws."""

import copy
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from poisonshield.cli import app
from poisonshield.errors import ConfigError
from poisonshield.evals import EVALUATIONS, base, knn, robust
from poisonshield.evals.parts.numbers import values_of
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import load_method
from poisonshield.runs.parts.image_data import build_training_set, open_data
from poisonshield.runs.parts.samples import build_subject

ROOT = Path(__file__).resolve().parents[2]
MINI = str(ROOT / "configs" / "defend" / "vespr_cifar10_mini.yaml")
TINY = ["engine.max_steps=2", "engine.log_every_steps=1", "engine.device=cpu", "method.hidden=16", "method.out=16",
        "model.widths=[8,8,8,8]", "evaluate.robust=null", "evaluate.alignment=null"]  # fmt: skip
ALL = ["evaluate.robust={attack: {steps: 2, restarts: 2}, samples: 60}", "evaluate.knn.weighted=true",
       "evaluate.linear={rates: [0.01, 0.1], epochs: 3}", "evaluate.alignment.samples=40",
       "evaluate.lipschitz={samples: 20, steps: 2, restarts: 2}", "evaluate.pairs.samples=30"]  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def trained(folder, *overrides):
    assert invoke("train", MINI, *TINY, *overrides, f"run.dir={folder}").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "vespr")


@pytest.fixture(scope="module")
def subject(joint):
    run = read_experiment(joint / "config.yaml")
    data = open_data(run)
    device = torch.device("cpu")
    method = load_method(run, data, load_file(joint / "export" / "method.safetensors"), device)
    return build_subject(run, data, build_training_set(run, data), method, device)


@pytest.fixture(scope="module")
def samples(subject):
    return subject.samples


def evaluated(folder, *arguments):
    assert invoke("evaluate", folder, *arguments).exit_code == 0
    return json.loads((folder / "evaluation.json").read_text())


def test_training_leaves_out_what_the_settings_switch_off(joint, tmp_path):
    out = json.loads((joint / "evaluation.json").read_text())
    assert out["spectrum"]["effective_rank"] >= 1 and len(out["spectrum"]["log10_shares"]) == 8
    assert "sweep" not in out["linear"]
    assert {k for k, v in out.items() if v is None} == {"robust", "alignment", "lipschitz", "pairs"}
    assert (joint / "probes.png").read_bytes().startswith(b"\x89PNG")


def test_a_joint_checkpoint_gets_every_readout_and_probe_and_gets_them_again(joint):
    (joint / "probes.png").unlink()
    first = evaluated(joint, *ALL)
    settings = first.pop("settings")
    assert settings["pairs"] == {"samples": 30} and settings["knn"]["weighted"] is True
    assert list(first["linear"]["sweep"]) == ["0.01", "0.1"]
    values = values_of(first, EVALUATIONS)
    assert values["aligned_samples"] == 40 and values["pairs"] == 30
    assert all(math.isfinite(v) for v in values.values())
    assert (joint / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert evaluated(joint, *ALL) == {**first, "settings": settings}
    (row,) = json.loads((joint / "results.json").read_text())
    keys = "data poison method defense seed test_top1 knn_top1 linear_top1 steps seconds"
    assert list(row) == keys.split() and row["knn_top1"] == round(values["knn_top1"], 2) and row["steps"] == 2


def test_accuracy_under_attack_is_read_from_class_scores(joint, subject):
    """Without a radius it is the classifier's accuracy on the same images, and not the features' largest element."""
    out = evaluated(joint, "evaluate.robust={attack: {steps: 1}, eps: 0}")
    assert out["robust"]["robust_top1"] == out["classifier"]["test_top1"]
    assert subject.method.logits(next(subject.samples.test()).x).shape[1] == 10 != subject.method.encoder.feature_dim


def test_numbers_are_printed_by_name(joint):
    out = invoke("evaluate", joint, *ALL).stdout
    for name in ("robust_top1", "effective_rank", "mutual_information", "lipschitz_unit", "psn_cln_sim",
                 "linear.sweep.0.1"):  # fmt: skip
        assert f"\n{name} " in out
    assert re.search(r"^test_top1 +[\d.]+ % classifier$", out, re.MULTILINE)
    assert re.search(r"^psn_cln_sim +[\d.]+   cosine: clean, poisoned$", out, re.MULTILINE)
    assert "log10_shares" not in out


def test_a_method_without_classifier_and_poison_gets_the_rest(tmp_path, caplog):
    folder = trained(tmp_path / "simclr", "defenses=[]", "data.poison=null")
    with caplog.at_level(logging.WARNING):
        out = evaluated(folder, *ALL)
    assert out["classifier"] == {"test_top1": None, "train_top1": None} and out["robust"] == {"robust_top1": None}
    assert set(out["pairs"].values()) == {None} and "poisons nothing itself" in caplog.text
    assert out["lipschitz"]["lipschitz_raw"] > 0


def test_clean_and_poisoned_batches_are_the_same_samples(samples):
    clean, poisoned = list(samples.clean(700)), list(samples.train(700))
    assert [b.keys for b in clean] == [b.keys for b in poisoned] and [len(b) for b in clean] == [500, 200]
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a.y, b.y)
        assert 0 < (a.x - b.x).abs().max() <= 8 / 255 + 1e-6


def test_a_draw_depends_on_the_seed_alone_and_all_come_in_order(samples):
    keys = [k for b in samples.test(300) for k in b.keys]
    assert len(keys) == len(set(keys)) == 300
    assert keys == [k for b in samples.test(300) for k in b.keys]
    everything = [k for b in samples.test() for k in b.keys]
    assert keys != everything[:300] and set(keys) < set(everything)
    assert [k for b in samples.test(10**6) for k in b.keys] == everything == list(samples.data.test.keys)


def test_legacy_draws_its_bank_queries_and_attacked_images(joint, monkeypatch):
    seen = {}

    def spy(name, of):
        module = {"knn": knn, "robust": robust}[name]
        original = getattr(module, name)

        def wrapped(*arguments, **settings):
            arguments = [list(a) if hasattr(a, "__next__") else a for a in arguments]
            seen[name] = (of(*arguments), settings)
            return original(*arguments, **settings)

        monkeypatch.setattr(module, name, wrapped)

    spy("knn", lambda bank, queries: (len(bank.y), len(queries.y), bank.h))
    spy("robust", lambda method, batches, *attack: sum(len(b) for b in batches))
    monkeypatch.setattr(base, "LEGACY_BANK", 400)
    monkeypatch.setattr(base, "LEGACY_QUERIES", 90)
    monkeypatch.setattr(robust, "LEGACY_ATTACKED", 30)
    small = ["evaluate.robust.attack.steps=1", "evaluate.alignment=null"]
    out = evaluated(joint, "--legacy", *small)
    assert out["settings"]["legacy"] is True
    assert seen["knn"][0][:2] == (400, 90) and seen["robust"][0] == 30 and seen["robust"][1]["loss"] == "logit"
    first = seen["knn"][0][2]
    assert evaluated(joint, *small, "evaluate.legacy=true") == out and torch.equal(seen["knn"][0][2], first)
    plain = evaluated(joint, *small)
    assert plain["settings"]["legacy"] is False and plain["classifier"] == out["classifier"]
    assert seen["knn"][0][:2] == (5000, 1000) and seen["robust"][0] == 1000 and seen["robust"][1]["loss"] == "ce"


def test_legacy_takes_all_of_a_small_set_and_its_bank_is_augmented(joint, samples):
    out = evaluated(joint, "--legacy", "evaluate.alignment=null")
    assert out["robust"] is None and 0 <= out["knn"]["knn_top1"] <= 100
    bank, plain = next(samples.crops(10_240)), next(samples.train(10_240))
    assert bank.keys == plain.keys and bank.x.shape == plain.x.shape
    assert (bank.x != plain.x).flatten(1).any(1).float().mean() > 0.95
    assert sum(len(b) for b in samples.crops(10_240)) == 5000


def test_settings_of_an_older_run_are_told_their_new_names(joint, tmp_path):
    record = yaml.safe_load((joint / "config.yaml").read_text())
    record["evaluate"] = {"batch_size": 500, "knn_k": 20, "robust_samples": 500, "pair_samples": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(ConfigError) as error:
        read_experiment(tmp_path / "config.yaml")
    for old, new in (("knn_k", "knn.k"), ("robust_samples", "robust.samples"), ("pair_samples", "pairs.samples")):
        assert f"evaluate.{old} is called evaluate.{new} now." in str(error.value)


def test_images_are_read_at_the_size_that_was_trained_on(samples):
    """views.size 28: shorter side to 32, then the middle; without it images stay as they are."""
    run = copy.copy(samples.run)
    views = run.settings.views.model_copy(update={"size": 28})
    run.settings = run.settings.model_copy(update={"views": views})
    sized = replace(samples, run=run)
    whole, middle = next(samples.test(8)).x, next(sized.test(8)).x
    assert whole.shape[2:] == (32, 32) and torch.equal(middle, whole[:, :, 2:30, 2:30])
    assert next(sized.train(8)).x.shape[2:] == next(sized.clean(8)).x.shape[2:] == (28, 28)
    assert next(sized.augmented(8)).x.shape[2:] == (28, 28)

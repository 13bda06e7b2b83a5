"""Train, evaluate, doctor and demo as commands: what they leave behind and what they say."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from poisonshield.api import demo as demo_command
from poisonshield.api import train
from poisonshield.api.demo import STORIES, summary
from poisonshield.api.stories import Length
from poisonshield.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
MINI = str(ROOT / "configs" / "defend" / "vespr_cifar10_mini.yaml")
TINY = ["engine.max_steps=3", "engine.log_every_steps=1", "engine.device=cpu", "method.hidden=16", "method.out=16"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vespr"
    assert invoke("train", MINI, *TINY, "evaluate.robust.samples=50", f"run.dir={folder}").exit_code == 0
    return folder


def test_run_folder_is_complete(run):
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.jsonl", "results.json", "results.png", "evaluation.json"} <= files
    assert {"export/backbone.safetensors", "export/method.safetensors", "checkpoints/step-00000003/index.json"} <= files
    assert (run / "results.png").read_bytes().startswith(b"\x89PNG")


def test_results_row_has_the_agreed_keys(run):
    rows = json.loads((run / "results.json").read_text())
    assert len(rows) == 1 and list(rows[0]) == [
        "data", "poison", "method", "defense", "seed", "test_top1", "knn_top1", "linear_top1", "steps", "seconds"
    ]  # fmt: skip
    assert (rows[0]["data"], rows[0]["poison"], rows[0]["defense"]) == ("cifar10-mini", "regions", "vespr")
    assert all(0 <= rows[0][k] <= 100 for k in ("test_top1", "knn_top1", "linear_top1")) and rows[0]["steps"] == 3


def test_config_is_resolved_and_runs_again(run):
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["defenses"][0]["eps"] == "8/255" and record["engine"]["max_steps"] == 3
    printed = invoke("train", run / "config.yaml", "--print-config").stdout
    assert yaml.safe_load(printed) == record


def test_backbone_loads_strictly_into_timm(run):
    from timm.models.resnet import BasicBlock, ResNet

    stem = {"stem_type": "deep", "stem_width": 8}
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(16, 32, 64, 128), **stem)
    loaded = network.load_state_dict(load_file(run / "export" / "backbone.safetensors"), strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys


def test_full_resnet_backbone_loads_strictly_into_timm_and_torchvision(tmp_path):
    from torchvision.models import resnet18

    over = ["model.name=resnet18", "model.stem=imagenet", "engine.max_steps=1", "data.batch_size=4", "defenses=[]",
            "method.hidden=8", "method.out=8", "engine.device=cpu", "evaluate.robust=null"]  # fmt: skip
    from poisonshield.engine.runfolder import RunFolder
    from poisonshield.runs import read_experiment
    from poisonshield.runs.classify import build_method, export

    checked = read_experiment(MINI, [*over, f"run.dir={tmp_path}"])
    export(checked, build_method(checked, 10).state_dict(), RunFolder(tmp_path))
    state = load_file(tmp_path / "export" / "backbone.safetensors")
    timm.create_model("resnet18", num_classes=0).load_state_dict(state, strict=True)
    network = resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(state, strict=True)


def test_evaluation_again_gives_the_same_numbers(run):
    before = json.loads((run / "evaluation.json").read_text())
    out = invoke("evaluate", run).stdout
    said = {k: float(v) for k, v in re.findall(r"^(\w+_top1) +([\d.]+) %", out, re.MULTILINE)}
    blocks = [block for name, block in before.items() if name != "settings" and block is not None]
    assert said == {k: pytest.approx(v, abs=0.006) for block in blocks for k, v in block.items() if k in said}
    assert set(said) == {"test_top1", "train_top1", "knn_top1", "linear_top1", "robust_top1"}


@pytest.mark.parametrize("text", ["seed=7", "defenses=[]", "data.test=elsewhere"])
def test_evaluation_does_not_change_what_was_trained(run, text, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), text])
    assert f"{text}: a finished run keeps what it was trained with" in capsys.readouterr().err


def test_evaluation_of_an_unfinished_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(tmp_path)])
    assert end.value.code == 1 and "is not a finished run" in capsys.readouterr().err


def test_run_folder_of_other_settings_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        main(["train", MINI, *TINY, "seed=5", f"run.dir={run}"])
    assert "holds a run with other settings: seed" in capsys.readouterr().err


def test_deepspeed_json_is_shown_beside_ours():
    out = invoke("train", MINI, "engine.backend=deepspeed", "engine.zero_stage=2", "--print-config").stdout
    ours, theirs = out.split("# DeepSpeed gets:")
    assert yaml.safe_load(ours)["engine"]["zero_stage"] == 2
    assert json.loads(theirs)["zero_optimization"]["stage"] == 2


def test_doctor_names_versions_devices_and_launchers():
    out = invoke("doctor").stdout
    sections = ("versions", "devices", "engine backends")
    for word in (
        *sections,
        torch.__version__.partition("+")[0],
        "cpu",
        "plain",
        "deepspeed",
        "torchrun",
        "cifar10-mini",
    ):
        assert word in out


def test_demo_leaves_a_table_pictures_and_one_self_contained_page(tmp_path, monkeypatch, caplog):
    """Four trainings of three steps: the numbers mean nothing here, the pieces must all be there."""
    whole = demo_command.run_stories
    quick = ["model.widths=[8,8,8,8]", "engine.device=cpu"]
    monkeypatch.setattr(demo_command, "fit_to_machine", lambda: Length(3, 632, 0.5))
    monkeypatch.setattr(demo_command, "run_stories", lambda c, s, out, over: whole(c, s, out, [*over, *quick]))
    with caplog.at_level("INFO"):
        result = invoke("demo", "vespr", "--out", tmp_path / "demo", "--seed", 1)
    assert result.exit_code == 0 and all(story.title in caplog.text for story in STORIES)
    assert "This machine: 0.5 steps a second; 3 of 632 steps a story." in caplog.text
    assert "Shortened to 3 of 632 steps" in " ".join(result.stdout.split())
    assert "linear probe" in result.stdout and result.stdout.count(" poisoned data ") >= 3
    rows = json.loads((tmp_path / "demo" / "vespr" / "results.json").read_text())
    assert [(r["poison"], r["defense"]) for r in rows] == [
        ("none", "none"), ("regions", "none"), ("regions", "ssl+ce"), ("regions", "vespr")
    ]  # fmt: skip
    assert {(r["seed"], r["steps"]) for r in rows} == {(1, 3)}
    page = (tmp_path / "demo" / "vespr" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    for row in rows:
        assert f"{row['test_top1']:.1f}" in page
    assert "300,000 parameters" in page and "Shortened to 3 of 632 steps" in page


def test_summary_states_the_share_that_came_back():
    rows = [{"test_top1": v} for v in (60.0, 30.0, 40.0, 48.0)]
    assert "30.0 points" in summary(rows) and "60 % of the loss is back" in summary(rows)
    assert "back" not in summary([{"test_top1": v} for v in (30.0, 60.0, 1.0, 1.0)])


def test_shortcut_is_watched_during_training_without_changing_it(tmp_path):
    """The log shows that poisoned images cost the classifier less than clean ones; weights are those of a blind run."""
    common = ["engine.max_steps=16", "engine.log_every_steps=4", "engine.device=cpu", "evaluate.robust=null",
              "evaluate.knn=null", "evaluate.linear=null", "method={name: supervised}", "defenses=[]"]  # fmt: skip
    weights = {}
    for count in (0, 64):
        folder = train(MINI, [*common, f"run.dir={tmp_path / str(count)}", f"evaluate.watch_pairs={count}"])
        weights[count] = load_file(folder / "export" / "method.safetensors")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(("psn_cln_sim" in line) == ("ce_gap" in line) == (count > 0) for line in lines)
    assert all(torch.equal(v, weights[64][k]) for k, v in weights[0].items())
    assert -1 <= lines[-1]["psn_cln_sim"] < 1 and lines[-1]["ce_gap"] > 0

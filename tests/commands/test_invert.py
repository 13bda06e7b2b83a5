"""Textual inversion as commands: a whole run on a random pipeline, resumed, launched on two ranks, poisoned, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder

from poisonshield.commands import demo_szt
from poisonshield.commands.evaluate import evaluate
from poisonshield.commands.invert import invert
from poisonshield.commands.train import train
from poisonshield.errors import ConfigError


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline") / "p", size=64)


@pytest.fixture
def settings(tmp_path, pipeline):
    return [
        f"model.pipeline={json.dumps(str(pipeline))}",
        f"run.dir={json.dumps(str(tmp_path / 'run'))}",
        "data.batch_size=2", "engine.max_steps=4", "generate.count=2", "generate.steps=2", "engine.device=cpu",
        "data.count=3",
    ]  # fmt: skip


CONFIG = "configs/invert/rendered.yaml"
SZT = ["defenses=[{name: szt, t_min: 500, mask: file}]", "data.masks=file"]


def vectors(folder):
    return load_file(folder / "export" / "yellow-ring" / "learned_embeds.safetensors")["<yellow-ring>"]


def test_a_run_leaves_embeddings_pictures_and_numbers(tmp_path, settings):
    folder = train(CONFIG, [*settings, *SZT, "generate.every_steps=2", "engine.log_every_steps=1"])
    row = json.loads((folder / "results.json").read_text())[0]
    assert (row["concept"], row["defense"], row["poison"], row["steps"], row["t_min"]) == ("yellow_ring", "szt", "none", 4, 500)
    assert vectors(folder).shape == (2, 16)
    assert len(list((folder / "pictures" / "yellow_ring").glob("recon-*.png"))) == 2
    assert (folder / "pictures.png").is_file() and len(list((folder / "validation").glob("*.png"))) == 2


def test_a_run_stopped_and_resumed_is_the_whole_run_to_the_bit(tmp_path, settings):
    whole = vectors(invert(CONFIG, [*settings, *SZT]))
    other = [s for s in settings if not s.startswith("run.dir")] + [f"run.dir={json.dumps(str(tmp_path / 'other'))}", *SZT]
    invert(CONFIG, [*other, "engine.max_steps=2"])
    resumed = invert(CONFIG, [*other, "engine.resume=auto"])
    assert torch.equal(vectors(resumed), whole)


def test_several_concepts_train_together_and_each_has_its_file(settings):
    folder = invert(CONFIG, [*settings, "data.concepts=[yellow ring, purple star]"])
    assert {r["concept"] for r in json.loads((folder / "results.json").read_text())} == {"yellow_ring", "purple_star"}
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["purple-star", "yellow-ring"]


def test_the_poison_of_a_run_is_made_once_and_kept(tmp_path, settings):
    poison = ["data.poison={name: advdm, eps_levels: 8, steps: 2}", f"data.poison_cache={json.dumps(str(tmp_path / 'cache'))}"]
    folder = invert(CONFIG, [*settings, *poison])
    made = list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(made) == 1 and json.loads(made[0].read_text())
    assert json.loads((folder / "results.json").read_text())[0]["poison"] == "advdm"
    before = made[0].stat().st_mtime_ns
    invert(CONFIG, [*settings, *poison, "run.overwrite=true"])
    assert made[0].stat().st_mtime_ns == before


def test_a_finished_run_is_evaluated_again_with_other_pictures(settings):
    folder = invert(CONFIG, settings)
    before = json.loads((folder / "results.json").read_text())[0]
    again = evaluate(folder, ["generate.count=3"])
    assert len(list((folder / "pictures" / "yellow_ring").glob("recon-*.png"))) == 3
    assert again["word"] == before["word"] and again["steps"] == before["steps"]
    assert evaluate(folder)["high_frequency"] == before["high_frequency"]
    with pytest.raises(ConfigError, match="keeps what it was trained with"):
        evaluate(folder, ["method.vectors=1"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.masks=file"], "no defense uses it"),
        (["defenses=[{name: szt, mask: file}]"], "data.masks is null"),
        (["defenses=[{name: vespr}]"], "defends the training of classifiers"),
        (["defenses=[{name: szt, mask: null, t_min: 1500}]"], "t_min"),
        (["engine.precision=bf16", "engine.max_steps=2"], "model.dtype: bf16"),
        (["data.tokens={yellow_ring: ring}"], "vocabulary already"),
        (["data.concepts=[mauve ring]"], "not of the rendered world"),
        (["data.poison={name: advdn}"], "Did you mean advdm"),
        (["model.pipeline=nowhere"], "vae/config.json is missing"),
        (["data.poison_masks=file"], "data.poison is null"),
        (["data.size=32"], "does nothing to rendered pictures"),
        (["generate.clean=photos"], "fresh clean pictures"),
        (["generate.switch=true"], "method.init is numbers"),
        (["generate.recon=[a photo]"], "learned word belongs"),
        (["generate.recon=[]"], "generate.recon"),
        (["data.poison={name: vae, mask: loss}"], "neither a mask"),
    ],
)
def test_mistakes_are_worded_and_leave_no_folder(tmp_path, settings, overrides, words):
    with pytest.raises(ConfigError, match=words):
        invert(CONFIG, [*settings, *overrides])
    assert not (tmp_path / "run" / "results.json").exists()


def test_demo_szt_leaves_a_table_pictures_and_one_self_contained_page(tmp_path, monkeypatch):
    """Four inversions of two steps on the shipped pipeline: the numbers mean nothing here, the pieces must be there."""
    quick = ["engine.max_steps=2", "generate.count=2", "generate.steps=2", "engine.device=cpu", "data.count=2"]
    whole = demo_szt.invert

    def run(config, overrides):
        poison = ["data.poison.steps=1"] if any(o.startswith("data.poison=") for o in overrides) else []
        return whole(config, [*overrides, *quick, *poison])

    monkeypatch.setattr(demo_szt, "invert", run)
    rows = demo_szt.demo(tmp_path / "szt", 1)
    assert [(r["poison"], r["seed"]) for r in rows] == [("none", 1), ("advdm", 1), ("advdm", 1), ("advdm", 1)]
    assert [r["t_min"] for r in rows] == [0, 0, 500, 500]
    page = (tmp_path / "szt" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert all(f"{r['fidelity']:.2f}" in page for r in rows)
    assert (tmp_path / "szt" / "pictures.png").is_file()


def test_the_demo_says_what_came_back():
    told = demo_szt.summary([{"fidelity": v} for v in (0.8, 0.4, 0.6, 0.8)])
    assert "0.80 to 0.40" in told and "50 %" in told and "100 %" in told
    assert "bring back" not in demo_szt.summary([{"fidelity": v} for v in (0.8, 0.9, 0.6, 0.8)])

"""Textual inversion as commands: a run on a random pipeline, resumed, launched on two ranks, poisoned, refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder
from typer.testing import CliRunner

from poisonshield.api import demo_szt, evaluate, train
from poisonshield.api.stories import Length
from poisonshield.cli import app
from poisonshield.data.concepts.writer import write_concepts
from poisonshield.errors import ConfigError, DataError
from poisonshield.evals.diffusion.brisque import brisque
from poisonshield.runs import read_experiment, read_finished
from poisonshield.runs.parts.reading import read_references
from poisonshield.runs.parts.words import load_model, open_concepts, select_for_training
from poisonshield.world.rendered import rendered_concepts


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
    assert (row["concept"], row["defense"], row["poison"], row["steps"], row["t_min"]) == (
        "yellow_ring",
        "szt",
        "none",
        4,
        500,
    )
    assert row["mask_area"] > 0 and row["mask_iou"] is None and row["round_trip_error"] > 0
    assert (row["brisque"] is None) == (brisque(torch.rand(1, 3, 64, 64))["status"] != "ok")
    assert vectors(folder).shape == (2, 16)
    assert len(list((folder / "pictures" / "yellow_ring").glob("recon-*.png"))) == 2
    assert (folder / "pictures.png").is_file() and len(list((folder / "validation").glob("*.png"))) == 2


def test_a_run_stopped_and_resumed_is_the_whole_run_to_the_bit(tmp_path, settings):
    whole = vectors(train(CONFIG, [*settings, *SZT]))
    other = [s for s in settings if not s.startswith("run.dir")] + [
        f"run.dir={json.dumps(str(tmp_path / 'other'))}",
        *SZT,
    ]
    train(CONFIG, [*other, "engine.max_steps=2"])
    resumed = train(CONFIG, [*other, "engine.resume=auto"])
    assert torch.equal(vectors(resumed), whole)


def test_several_concepts_train_together_and_each_has_its_file(settings):
    folder = train(CONFIG, [*settings, "data.concepts=[yellow ring, purple star]"])
    assert {r["concept"] for r in json.loads((folder / "results.json").read_text())} == {"yellow_ring", "purple_star"}
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["purple-star", "yellow-ring"]


def test_the_poison_of_a_run_is_made_once_and_kept(tmp_path, settings):
    poison = [
        "data.poison={name: advdm, eps_levels: 8, steps: 2}",
        f"data.poison_cache={json.dumps(str(tmp_path / 'cache'))}",
    ]
    folder = train(CONFIG, [*settings, *poison])
    made = list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(made) == 1 and json.loads(made[0].read_text())
    assert json.loads((folder / "results.json").read_text())[0]["poison"] == "advdm"
    before = made[0].stat().st_mtime_ns
    train(CONFIG, [*settings, *poison, "run.overwrite=true"])
    assert made[0].stat().st_mtime_ns == before


def test_a_finished_run_is_evaluated_again_with_other_pictures(settings):
    folder = train(CONFIG, settings)
    before = json.loads((folder / "results.json").read_text())[0]
    (again,) = evaluate(folder, ["generate.count=3"])
    assert len(list((folder / "pictures" / "yellow_ring").glob("recon-*.png"))) == 3
    assert again["word"] == before["word"] and again["steps"] == before["steps"]
    assert json.loads((folder / "evaluation.json").read_text())["settings"]["count"] == 3
    assert evaluate(folder)[0] == before
    with pytest.raises(ConfigError, match="keeps what it was trained with"):
        evaluate(folder, ["method.vectors=1"])


def test_evaluate_prints_a_line_for_each_concept(settings):
    folder = train(CONFIG, [*settings, "data.concepts=[yellow ring, purple star]"])
    out = CliRunner().invoke(app, ["evaluate", str(folder)], catch_exceptions=False).stdout
    assert out.count("\n| purple_star | od |") == out.count("\n| yellow_ring | od |") == 1


def test_evaluations_of_words_may_be_switched_and_old_settings_are_told_their_names(settings):
    folder = train(CONFIG, settings)
    (row,) = evaluate(folder, ["evaluate.word=null", "evaluate.networks.folders={clip: nowhere}"])
    assert "word" not in row and row["clip_i"] is None and row["networks"]["clip_i"]["status"] == "unavailable"
    assert read_finished(folder).describe([row]).endswith(" |  |")  # no nearest words
    with pytest.raises(ConfigError, match="generate.features is called evaluate.networks.folders now"):
        evaluate(folder, ["generate.features={clip: nowhere}"])


def test_masks_of_a_reference_measure_those_that_szt_makes_and_change_nothing(tmp_path, settings):
    made = ["defenses=[{name: szt, mask: box}]", f"run.dir={json.dumps(str(tmp_path / 'made'))}"]
    plain, measured = (
        train(CONFIG, [*settings, *made]),
        train(CONFIG, [*settings, *made[:1], "data.mask_reference=file"]),
    )
    assert torch.equal(vectors(plain), vectors(measured))
    (without,), (row,) = (json.loads((f / "results.json").read_text()) for f in (plain, measured))
    assert without["mask_iou"] is None and row["mask_area"] == without["mask_area"] == pytest.approx(
        (48 / 64) ** 2, abs=1e-4
    )
    overlaps = []
    for image in rendered_concepts(3, seed=1, kinds=[("yellow", "ring")])[0].images:
        box = torch.zeros(1, 64, 64)
        box[:, 8:56, 8:56] = 1  # round(0.75 * 64) pixels a side, in the middle
        overlaps.append(float(torch.minimum(box, image.mask).sum() / torch.maximum(box, image.mask).sum()))
    assert row["mask_iou"] == pytest.approx(sum(overlaps) / 3, abs=1e-4)
    assert evaluate(measured)[0] == row


def test_a_picture_left_out_is_not_learned_from_and_alone_compared_with(tmp_path, settings, caplog):
    write_concepts(rendered_concepts(5, seed=1, kinds=[("yellow", "ring")]), tmp_path / "photos")
    given = [s for s in settings if not s.startswith("data.count")] + [
        f"data.train={json.dumps(str(tmp_path / 'photos'))}",
        "data.concepts=null",
        "data.left_out=2",
        "engine.max_steps=2",
    ]
    folder = train(CONFIG, given)
    (row,) = json.loads((folder / "results.json").read_text())
    assert row["left_out"] == 2 and row["feature_distance"] is None and -1 <= row["latent_cosine"] <= 1
    run = read_experiment(CONFIG, given)
    whole = open_concepts(run.settings.data, load_model(run.settings.model))
    (rest,) = select_for_training(run.settings.data, whole)
    assert [i.stem for i in rest.images] == ["00", "01", "03", "04"]
    assert torch.equal(read_references(run, whole[0]), whole[0].images[2].pixels[None].float() / 255)
    with pytest.raises(DataError, match="picture 5 of .* cannot be left out"):
        open_concepts(
            read_experiment(CONFIG, [*given, "data.left_out=5"]).settings.data, load_model(run.settings.model)
        )


def test_pictures_while_learning_do_not_depend_on_where_a_run_was_stopped(tmp_path, settings):
    every = ["generate.every_steps=2", "engine.log_every_steps=1", "engine.max_steps=5"]
    sheets = lambda folder: sorted(p.name for p in (folder / "validation").iterdir())
    whole = sheets(train(CONFIG, [*settings, *every]))
    assert whole == ["step-000002.png", "step-000004.png"]
    other = [s for s in settings if not s.startswith("run.dir")] + [
        f"run.dir={json.dumps(str(tmp_path / 'other'))}",
        *every,
    ]
    train(CONFIG, [*other, "engine.max_steps=3"])
    assert sheets(train(CONFIG, [*other, "engine.resume=auto"])) == whole


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.masks=file"], "no defense uses it"),
        (["defenses=[{name: szt, mask: file}]"], "data.masks is null"),
        (["defenses=[{name: vespr}]"], "defends the training of classifiers"),
        (["defenses=[{name: szt, mask: null, t_min: 1500}]"], "t_min"),
        (["engine.precision=bf16", "engine.max_steps=2"], "model.dtype: bf16"),
        (["data.tokens={yellow_ring: ring}"], "vocabulary already"),
        (
            ["data.concepts=[yellow ring, red star]", "data.tokens={yellow_ring: <a>, red_star: a}"],
            "differ by <> at most",
        ),
        (["data.concepts=[mauve ring]"], "not of the rendered world"),
        (["data.poison={name: advdn}"], "Did you mean advdm"),
        (["model.pipeline=nowhere"], "nowhere is no folder"),
        (["data.poison_masks=file"], "data.poison is null"),
        (["data.mask_reference=file"], "szt makes no mask to compare"),
        (["defenses=[{name: szt, mask: null}]", "data.mask_reference=file"], "szt makes no mask to compare"),
        (["defenses=[{name: szt, mask: box}]", "data.masks=file"], "data.mask_reference: file instead"),
        (
            [
                "defenses=[{name: szt, mask: box}]",
                "data.mask_reference=file",
                "data.poison_masks=alpha",
                "data.poison=advdm",
            ],
            "one kind of mask",
        ),
        (["data.left_out=0"], "compared with fresh pictures"),
        (["data=[1]"], "data: .*dictionary"),
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
        train(CONFIG, [*settings, *overrides])
    assert not (tmp_path / "run" / "results.json").exists()


def test_demo_szt_leaves_a_table_pictures_and_one_self_contained_page(tmp_path, monkeypatch):
    """Four inversions of two steps on the shipped pipeline: the numbers mean nothing here, the pieces must be there."""
    quick = ("generate.count=2", "generate.steps=2", "engine.device=cpu", "data.count=2")
    poison = lambda story: (
        ("data.poison.steps=1",) if any(o.startswith("data.poison=") for o in story.overrides) else ()
    )
    stories = [replace(s, overrides=(*s.overrides, *quick, *poison(s))) for s in demo_szt.STORIES]
    monkeypatch.setattr(demo_szt, "STORIES", stories)
    monkeypatch.setattr(demo_szt, "fit_to_machine", lambda: Length(2, 300, 0.5))
    shown = demo_szt.demo(tmp_path / "szt", 1)
    rows = json.loads((tmp_path / "szt" / "results.json").read_text())
    assert [cells[0] for cells in shown.cells] == [f"{r['fidelity']:.2f}" for r in rows]
    assert [(r["poison"], r["seed"]) for r in rows] == [("none", 1), ("advdm", 1), ("advdm", 1), ("advdm", 1)]
    assert [(r["t_min"], r["steps"]) for r in rows] == [(0, 2), (0, 2), (500, 2), (500, 2)]
    page = (tmp_path / "szt" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert all("Shortened to 2 of 300 steps" in told for told in (page, shown.summary))
    assert all("Do not compare the defenses here" in told for told in (page, shown.summary))
    assert all(f"{r['fidelity']:.2f}" in page for r in rows)
    assert (tmp_path / "szt" / "pictures.png").is_file()


def test_the_demo_says_what_came_back():
    told = demo_szt.summary([{"fidelity": v} for v in (0.8, 0.4, 0.6, 0.8)])
    assert "0.80 to 0.40" in told and "50 %" in told and "100 %" in told
    assert "bring back" not in demo_szt.summary([{"fidelity": v} for v in (0.8, 0.9, 0.6, 0.8)])

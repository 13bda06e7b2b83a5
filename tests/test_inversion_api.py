"""Textual inversion from Python: presets are the configs, concepts learn as each alone, the model stays as it was."""

import json

import pytest
import torch
from dist import run_dist
from runs import CONFIGS
from safetensors.torch import load_file
from tiny import tiny_folder, tiny_model

from poisonshield.api import train
from poisonshield.api.words import (
    PRESETS,
    _refuse_another_gpu,
    preset_run,
    train_many,
    train_textual_inversion,
    words,
)
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.defenses.diffusion.szt import SZT
from poisonshield.errors import CheckpointError, ConfigError, DataError
from poisonshield.models.diffusion.embeddings import Learned
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.runs import read_experiment
from poisonshield.world.rendered import rendered_concepts

NAMES = ("yellow_ring", "purple_star", "red_cross")
SHORT = {"steps": 5, "batch": 2, "lr": 2e-2}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def concepts():
    """Three, with masks, 32 pixels a side."""
    kinds = [tuple(name.split("_")) for name in NAMES]
    return {c.name: c for c in rendered_concepts(3, seed=1, kinds=kinds, size=32)}


def pixels(concept):
    return torch.stack([image.pixels for image in concept.images])


def start(model, name, **method):
    """The vectors that a word starts from: one step at rate 0."""
    return train_textual_inversion(
        model,
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        name=name,
        szt=SZT.Config(mask=None),
        steps=1,
        lr=0.0,
        **method,
    ).vectors


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_config_of_its_name(model, preset):
    """All settings but the data's place, its cut, the pipeline, and the word that one concept starts from."""
    config = read_experiment(CONFIGS / "invert" / f"{preset}.yaml").record
    ours = preset_run(model, preset=preset).record
    for data in (config["data"], ours["data"]):
        del data["train"], data["crop"]
    for engine in (config["engine"], ours["engine"]):
        for how in ("resume", "device"):
            del engine[how]
    if config["method"]["init"] == "toy":
        del config["method"]["init"], ours["method"]["init"]
    for section in ("seed", "data", "method", "defenses", "optimizer", "schedule", "engine"):
        assert ours[section] == config[section], section


def test_a_model_on_another_gpu_is_refused_not_moved():
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    _refuse_another_gpu(first, first)
    _refuse_another_gpu(torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        _refuse_another_gpu(second, first)


def test_three_together_are_three_alone(model, concepts):
    together = train_many(model, concepts, vectors=2, **SHORT)
    assert list(together) == list(NAMES)
    for name, concept in concepts.items():
        alone = train_textual_inversion(model, concept, vectors=2, **SHORT)
        begun = start(model, name, vectors=2)
        moved = (alone.vectors - begun).norm()
        away = float((together[name].vectors - alone.vectors).norm() / moved)
        print(f"{name}: {away:.1e} of the distance moved, {float(moved):.3f}")
        assert away < 1e-5 and alone.token == together[name].token == f"<{name.replace('_', '-')}>"


def test_it_is_what_the_command_trains(tmp_path):
    """The same settings in a config file: the same numbers."""
    folder = tiny_folder(tmp_path / "pipeline", size=64)
    overrides = [
        f"model.pipeline={json.dumps(str(folder))}", f"run.dir={json.dumps(str(tmp_path / 'run'))}",
        "engine.device=cpu", "engine.max_steps=5", "data.batch_size=2", "data.count=3", "data.masks=file",
        "generate.count=1", "generate.steps=1", "defenses=[{name: szt, mask: file}]",
    ]  # fmt: skip
    train(str(CONFIGS / "invert" / "rendered.yaml"), overrides)
    theirs = load_file(tmp_path / "run" / "export" / "yellow-ring" / "learned_embeds.safetensors")["<yellow-ring>"]
    (concept,) = rendered_concepts(3, seed=1, kinds=[("yellow", "ring")])
    ours = train_textual_inversion(LatentDiffusion.load(folder), concept, vectors=2, **SHORT)
    assert torch.equal(ours.vectors, theirs)


def test_the_model_and_the_callers_random_numbers_are_left_alone(model, concepts):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    vocabulary, tokenizer = model.tokenizer.get_vocab(), model.tokenizer
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = train_textual_inversion(model, concepts["yellow_ring"], **SHORT)
    assert torch.equal(torch.rand(3), expected)
    assert model.tokenizer is tokenizer and tokenizer.get_vocab() == vocabulary and not model.placeholders
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    again = train_textual_inversion(model, concepts["yellow_ring"], **SHORT)
    assert torch.equal(first.vectors, again.vectors)


def test_pixels_will_do_and_are_the_concept_of_these_pixels(model, concepts):
    """With a defense that makes its masks."""
    box = SZT.Config(mask="box")
    from_pixels = train_many(model, {n: pixels(c) for n, c in concepts.items()}, szt=box, **SHORT)
    named = {
        n: Concept.of(n, [ConceptImage.of(n, f"{i:02d}", x) for i, x in enumerate(pixels(c))])
        for n, c in concepts.items()
    }
    from_concepts = train_many(model, named, szt=box, **SHORT)
    assert all(torch.equal(from_pixels[n].vectors, from_concepts[n].vectors) for n in NAMES)


def test_masks_count_where_the_preset_uses_them_and_are_not_read_where_it_does_not(model, concepts):
    ring = concepts["yellow_ring"]
    bare = Concept.of(ring.name, [ConceptImage.of(ring.name, i.stem, i.pixels) for i in ring.images])
    of = lambda concept, **how: train_textual_inversion(model, concept, **SHORT, **how).vectors
    assert torch.equal(of(ring, preset="diffusers"), of(bare, preset="diffusers"))
    assert not torch.equal(of(ring), of(ring, szt=SZT.Config(mask=None)))
    with pytest.raises(DataError, match="(?s)comes without a mask.*choose one that is made"):
        of(bare)
    with pytest.raises(DataError, match="has no caption"):
        of(Concept.of("ring", [ConceptImage.of("ring", "00", ring.images[0].pixels)]), preset="sdv1", init="ring")


def test_settings_of_the_caller_win_over_the_preset(model):
    given = {"steps": 7, "batch": 3, "lr": 0.5, "seed": 9, "tokens": {"a": "<b>"}, "run_dir": None}
    run = preset_run(
        model, preset="szt_long", szt=SZT.Config(mask="box", t_min=0.4), method={"init": "star", "vectors": 3}, **given
    )
    assert (run.settings.engine.max_steps, run.settings.data.batch_size, run.settings.optimizer.lr, run.seed) == (
        7,
        3,
        0.5,
        9,
    )
    assert (run.method.config.init, run.method.config.vectors, run.defenses[0].config.t_min) == ("star", 3, 0.4)
    assert run.settings.data.masks is None and preset_run(model, preset="szt_long").settings.engine.max_steps == 6000


def test_a_concept_goes_by_the_name_that_it_is_given(model, concepts):
    """Draws follow the name, so a renamed concept is another run; and a placeholder may be chosen."""
    ring = concepts["yellow_ring"]
    renamed = train_many(model, {"my toy": ring}, tokens={"my toy": "<sks>"}, **SHORT)["my toy"]
    assert renamed.token == "<sks>"
    assert not torch.equal(renamed.vectors, train_many(model, {"yellow_ring": ring}, **SHORT)["yellow_ring"].vectors)


def test_a_chosen_floor_is_resolved_on_the_pictures(model, concepts):
    """t_min: auto asks for the words' start, as the command does."""
    learned = train_textual_inversion(
        model, concepts["yellow_ring"], szt=SZT.Config(t_min="auto"), init="ring", **SHORT
    )
    assert learned.vectors.isfinite().all()


def test_a_run_folder_is_kept_and_gone_on_with(model, concepts, tmp_path):
    ring = concepts["yellow_ring"]
    whole = train_textual_inversion(model, ring, run_dir=tmp_path / "a", **SHORT)
    assert (tmp_path / "a" / "metrics.jsonl").is_file() and (tmp_path / "a" / "checkpoints" / "step-00000005").is_dir()
    again = train_textual_inversion(model, ring, run_dir=tmp_path / "a", **SHORT)
    train_textual_inversion(model, ring, run_dir=tmp_path / "b", **{**SHORT, "steps": 2})
    longer = train_textual_inversion(model, ring, run_dir=tmp_path / "b", **SHORT)
    assert torch.equal(again.vectors, whole.vectors) and torch.equal(longer.vectors, whole.vectors)
    with pytest.raises(ConfigError, match="other settings: optimizer.lr"):
        train_textual_inversion(model, ring, run_dir=tmp_path / "a", **{**SHORT, "lr": 1.0})
    with pytest.raises(CheckpointError, match="other concepts"):
        train_textual_inversion(model, concepts["purple_star"], name="yellow_ring", run_dir=tmp_path / "a", **SHORT)


def test_learned_words_are_known_while_asked_for_and_forgotten_after(model, concepts):
    learned = train_many(model, concepts, vectors=2, **SHORT)
    with words(model, learned.values()) as rows:
        context = model.prompts(["a photo of a <purple-star>"], rows)
        swapped = model.prompts(["a photo of a <purple-star>"], torch.cat([rows[:2], rows[:2], rows[4:]]))
        with pytest.raises(ConfigError, match="<red-cross> already, whose vectors are not given here"):
            train_many(model, concepts, **SHORT)
    assert rows.shape == (6, model.width) and not model.placeholders
    with words(model, [learned["yellow_ring"]]) as ring:
        alone = model.prompts(["a photo of a <yellow-ring>"], ring)
    torch.testing.assert_close(swapped, alone)  # the star's word with the ring's vectors is the ring's word
    assert not torch.allclose(context, alone, atol=1e-4)
    for given, told in (([], "got no word"), ([Learned("<wide>", torch.zeros(1, 32))], "32 wide, and .* wants 16")):
        with pytest.raises(ConfigError, match=told), words(model, given):
            pass


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"preset": "stz"}, ConfigError, "Did you mean szt"),
        ({"vector": 2}, ConfigError, "Did you mean vectors"),
        ({"steps": 0}, ConfigError, "engine.max_steps"),
        ({"init": "unheard"}, ConfigError, "one token"),
        ({"tokens": {"ring": "ring"}}, ConfigError, "vocabulary already"),
        ({"lr": -1.0, "batch": 0}, ConfigError, r"(?s)data.batch_size.*optimizer.lr|optimizer.lr.*data.batch_size"),
    ],
    ids=str,
)
def test_mistakes_are_worded_and_leave_the_model_usable(model, concepts, given, error, told):
    with pytest.raises(error, match=told):
        train_many(model, {"ring": concepts["yellow_ring"]}, **{**SHORT, **given})
    assert not model.placeholders


@pytest.mark.parametrize(
    "pictures",
    [torch.rand(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), ["a.png"]],
    ids=["float", "one", "list"],
)
def test_other_pictures_and_none_are_refused_with_a_way_out(model, pictures):
    with pytest.raises(DataError, match="uint8"):
        train_textual_inversion(model, pictures, **SHORT)
    with pytest.raises(ConfigError, match="no concept"):
        train_many(model, {})


@pytest.mark.slow
def test_thirty_subjects_of_photographs_train_in_one_batch(tmp_path, dreambooth_folder):
    """The load test's config, shortened; files beside the subjects' folders are no pictures."""
    pipeline = tiny_folder(tmp_path / "pipeline", size=64)
    overrides = [
        f"model.pipeline={json.dumps(str(pipeline))}", f"data.train={json.dumps(str(dreambooth_folder))}",
        f"run.dir={json.dumps(str(tmp_path / 'run'))}", "engine.device=cpu", "engine.max_steps=2",
        "engine.log_every_steps=1", "generate.count=1", "generate.steps=1",
    ]  # fmt: skip
    folder = train(str(CONFIGS / "invert" / "szt_dreambooth_tiny.yaml"), overrides)
    subjects = sorted(p.name for p in dreambooth_folder.iterdir() if p.is_dir())
    assert len(subjects) == 30
    rows = json.loads((folder / "results.json").read_text())
    assert [r["concept"] for r in rows] == subjects and {r["defense"] for r in rows} == {"szt(jpeg25, t500, box)"}
    files = sorted((folder / "export").glob("*/learned_embeds.safetensors"))
    assert sorted(p.parent.name.replace("-", "_") for p in files) == subjects
    starts = {tuple(v.tolist()) for path in files for v in load_file(path).values()}
    assert len(starts) == 30  # each word went its own way from "circle"


def on_ranks(rank, world):
    """What this rank is given back."""
    kinds = [tuple(name.split("_")) for name in NAMES[:2]]
    learned = train_many(tiny_model(), {c.name: c for c in rendered_concepts(3, seed=1, kinds=kinds, size=32)}, **SHORT)
    return {name: word.vectors.tolist() for name, word in learned.items()}


@pytest.mark.dist
def test_every_rank_of_a_launcher_gets_the_words_that_one_process_learns(model):
    alone, ranks = on_ranks(0, 1), run_dist(on_ranks, 2)
    assert ranks[0] == ranks[1]
    for name, vectors in alone.items():
        moved = (torch.tensor(vectors) - start(model, name)).norm()
        assert (torch.tensor(ranks[0][name]) - torch.tensor(vectors)).norm() < 1e-5 * moved

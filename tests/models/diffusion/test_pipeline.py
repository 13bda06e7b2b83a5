"""The frozen pipeline: what it refuses, and that learned rows reach the text encoder and nothing else moves."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_model

from poisonshield.errors import ConfigError, DataError, ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion


def test_learned_rows_take_the_place_of_the_placeholder_and_only_there():
    model = tiny_model()
    placeholder = model.add_placeholder("<sks>", 2)
    word = model.word_vector("ring")
    rows = torch.stack([word, model.word_vector("red")])
    ids = model.tokens(["a photo of a <sks>"])
    learned = model.text(ids, rows)
    written = model.prompts(["a photo of a ring red"])
    assert torch.equal(learned, written)
    assert placeholder.words == ("<sks>", "<sks>_1")
    assert not torch.equal(model.text(ids, rows + 1), learned)


def test_gradients_reach_the_rows_and_no_weight():
    model = tiny_model()
    model.add_placeholder("<sks>")
    rows = model.word_vector("ring")[None].requires_grad_()
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = model.prompts(["a <sks>", "the <sks>"], rows)
    model.predict(z, torch.tensor([10, 900]), context).square().mean().backward()
    assert rows.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_each_word_of_the_world_is_one_token():
    from poisonshield.world import WORDS

    model = tiny_model()
    for word in WORDS:
        assert model.word_vector(word).shape == (16,)


def test_known_words_and_long_prompts_are_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match="vocabulary already"):
        model.add_placeholder("ring")
    model.add_placeholder("<sks>")
    with pytest.raises(ConfigError, match="vocabulary already"):
        model.add_placeholder("<sks>")
    with pytest.raises(ConfigError, match="lower case"):
        model.add_placeholder("<SKS>")
    with pytest.raises(ConfigError, match="tokens too many"):
        model.tokens(["photo " * 30 + "<sks>"])
    with pytest.raises(ConfigError, match="no vectors"):
        model.prompts(["a <sks>"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline"))


WEIGHTS = [
    "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]


def copied(pipeline, tmp_path, **changes):
    """A copy of the folder with other bytes in some files; None removes a file."""
    shutil.copytree(pipeline, tmp_path / "copy")
    for name, data in changes.items():
        file = tmp_path / "copy" / name
        file.unlink() if data is None else file.write_bytes(data)
    return tmp_path / "copy"


def test_what_is_no_pipeline_is_refused_by_the_part_that_it_lacks(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="vae/config.json is missing"):
        LatentDiffusion.load(tmp_path)
    with pytest.raises(ConfigError, match="scheduler/scheduler_config.json is missing"):
        LatentDiffusion.load(copied(pipeline, tmp_path, **{"scheduler/scheduler_config.json": None}))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_whole_are_refused_by_file_with_the_way_out(pipeline, tmp_path, name):
    whole = (pipeline / name).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 335\n"
    for i, (data, words) in enumerate(
        [(None, "is missing.*\n.*again"), (pointer, "git lfs pull"), (whole[:-100], "not all there"), (b"", "is empty")]
    ):
        with pytest.raises(DataError, match=words) as caught:
            LatentDiffusion.load(copied(pipeline, tmp_path / str(i), **{name: data}))
        assert name in str(caught.value)


def test_settings_and_words_that_are_not_whole_are_refused_by_file(pipeline, tmp_path):
    broken = copied(pipeline, tmp_path / "a", **{"scheduler/scheduler_config.json": b'{"beta_end": '})
    with pytest.raises(DataError, match="scheduler_config.json is not valid JSON"):
        LatentDiffusion.load(broken)
    with pytest.raises(DataError, match="vocab.json is missing: the tokenizer would know no words"):
        LatentDiffusion.load(copied(pipeline, tmp_path / "b", **{"tokenizer/tokenizer.json": None}))


def test_weights_that_the_network_lacks_are_not_made_up(pipeline, tmp_path):
    for i, name in enumerate(WEIGHTS):
        folder, tensors = copied(pipeline, tmp_path / str(i)), load_file(pipeline / name)
        gone = sorted(tensors)[0]
        save_file({k: v for k, v in tensors.items() if k != gone}, folder / name, metadata={"format": "pt"})
        with pytest.raises(DataError, match="the weights lack") as caught:
            LatentDiffusion.load(folder)
        assert gone.rpartition(".")[2] in str(caught.value)


def test_weights_of_another_network_are_refused_by_part(pipeline, tmp_path):
    config = json.loads((pipeline / "unet" / "config.json").read_text()) | {"block_out_channels": [8, 16]}
    folder = copied(pipeline, tmp_path, **{"unet/config.json": json.dumps(config).encode()})
    with pytest.raises(DataError, match="unet cannot be read"):
        LatentDiffusion.load(folder)


def test_weights_in_several_files_are_read_and_a_missing_one_is_named(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    tensors, names = load_file(pipeline / WEIGHTS[1]), ["first.safetensors", "second.safetensors"]
    place = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file(
            {k: v for k, v in tensors.items() if place[k] == name}, folder / "unet" / name, metadata={"format": "pt"}
        )
    (folder / f"{WEIGHTS[1]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / WEIGHTS[1]).unlink()
    ours, theirs = (LatentDiffusion.load(f).unet.state_dict() for f in (folder, pipeline))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(DataError, match="second.safetensors is missing"):
        LatentDiffusion.load(folder)


def test_odd_sizes_are_refused():
    with pytest.raises(ShapeError, match="multiples of 2"):
        tiny_model().encode(torch.rand(1, 3, 15, 16))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_noise_is_recovered_from_a_perfect_prediction(prediction):
    model = tiny_model(prediction=prediction)
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 500, 999])
    z_t = model.noised(z, t, noise)
    assert torch.allclose(model.epsilon(model.target(z, t, noise), z_t, t), noise, atol=2e-5)


def test_a_placeholder_within_another_is_not_taken_for_it():
    model = tiny_model()
    short, long = model.add_placeholder("sks", 2), model.add_placeholder("sksdog", 2)
    ids = model.tokens(["a photo of a sksdog", "a photo of a sks"])
    assert [int(i) for i in ids[0] if i >= model.vocabulary] == [long.first, long.first + 1]
    assert [int(i) for i in ids[1] if i >= model.vocabulary] == [short.first, short.first + 1]


def test_the_digest_knows_whatever_decides_a_result():
    first = tiny_model()
    digests = {"first": first.digest(), "again": tiny_model().digest()}
    assert digests["first"] == digests.pop("again")
    digests["prediction"] = tiny_model(prediction="v_prediction").digest()
    for part, setting in (
        ("vae", {"scaling_factor": 0.5}),
        ("vae", {"shift_factor": 0.1}),
        ("scheduler", {"beta_end": 0.02}),
    ):
        model = tiny_model()
        getattr(model, part).register_to_config(**setting)
        digests[str(setting)] = model.digest()
    model = tiny_model()
    model.tokenizer.model_max_length = 12
    digests["length"] = model.digest()
    model = tiny_model()
    known = model.tokenizer.get_vocab()
    swapped = known | {"ring</w>": known["star</w>"], "star</w>": known["ring</w>"]}
    model.tokenizer.get_vocab = lambda: swapped
    digests["words"] = model.digest()
    model = tiny_model()
    next(model.unet.parameters()).view(-1)[0] += 1e-3
    digests["weights"] = model.digest()
    assert len(set(digests.values())) == len(digests)


def test_the_digest_knows_neither_learned_words_nor_places_nor_the_order_of_defaults(pipeline, tmp_path):
    """diffusers lists the settings that a scheduler's file leaves out in a set's order: another in every process."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    bare = {k: v for k, v in json.loads(file.read_text()).items() if k.startswith(("_class", "beta"))}
    models = [
        LatentDiffusion.load(
            copied(pipeline, tmp_path / n, **{"scheduler/scheduler_config.json": json.dumps(bare).encode()})
        )
        for n in "ab"
    ]
    models[0].add_placeholder("<sks>", 2)
    config = models[0].scheduler.config
    models[0].scheduler.register_to_config(_use_default_values=config["_use_default_values"][::-1])
    assert len(config["_use_default_values"]) > 5
    assert models[0].digest() == models[1].digest()

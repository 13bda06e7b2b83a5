"""The frozen pipeline: what it refuses, and that learned rows reach the text encoder and nothing else moves."""

import pytest
import torch
from tiny import tiny_model

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.latent_diffusion import LatentDiffusion


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
    from poisonshield.data.world import WORDS

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
    with pytest.raises(ConfigError, match="falls off its end"):
        model.tokens(["photo " * 30 + "<sks>"])
    with pytest.raises(ConfigError, match="no vectors"):
        model.prompts(["a <sks>"])


def test_a_folder_without_scheduler_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="vae/config.json is missing"):
        LatentDiffusion.load(tmp_path)


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

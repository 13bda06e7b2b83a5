"""Distances of picture sets, beside slow loops and beside transformers, and what is told when a network is missing."""

import json
import socket

import numpy
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from poisonshield import world
from poisonshield.errors import ConfigError, ShapeError
from poisonshield.evals.diffusion.distances import color_distance, energy_coefficient, set_distances
from poisonshield.evals.diffusion.latent_cosine import latent_cosine
from poisonshield.evals.diffusion.networks import QUALITY_PROMPTS, network_scores
from poisonshield.evals.diffusion.parts.similarity import cosine
from poisonshield.evals.diffusion.round_trip import round_trip_error
from poisonshield.models.feature_networks import FeatureNetwork, lacking
from poisonshield.world.judge import ConceptJudge
from poisonshield.world.small_pipeline import build_tokenizer

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def concept(color, shape, count, seed=0):
    return torch.stack([world.render(i, seed=seed, only=[(color, shape)]).x for i in range(count)])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(world.WORDS, folder, length=16)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def test_cosine_is_the_mean_over_all_pairs():
    h, g = torch.randn(4, 5, generator=rng()), torch.randn(3, 5, generator=rng(1))
    pairs = [float(a.double() @ b.double() / (a.double().norm() * b.double().norm())) for a in h for b in g]
    assert cosine(h, g) == pytest.approx(sum(pairs) / 12, abs=1e-9)


def test_latent_cosine_is_taken_in_the_pipelines_latents():
    model = tiny_model(size=16)
    x, y = torch.rand(3, 3, 16, 16, generator=rng()), torch.rand(2, 3, 16, 16, generator=rng(1))
    with torch.no_grad():
        h, g = model.encode(x).flatten(1), model.encode(y).flatten(1)
    expected = sum(float(torch.cosine_similarity(a, b, dim=0)) for a in h for b in g) / 6
    assert latent_cosine(model, x, y, micro_batch=2) == pytest.approx(expected, abs=1e-5)
    error = round_trip_error(model, x)
    with torch.no_grad():
        back = model.decode(model.encode(x)).clamp(0, 1)
    assert torch.allclose(error, (back - x).square().mean((1, 2, 3)), atol=1e-6)


def test_colour_distance_beside_numpys_histogram():
    x, y = torch.rand(3, 3, 8, 8, generator=rng()), torch.rand(2, 3, 10, 6, generator=rng(1)) ** 2
    shares = []
    for v in (x, y):
        points = v.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        counted, _ = numpy.histogramdd(points, bins=4, range=[(0, 1)] * 3)
        shares.append(counted / len(points))
    assert color_distance(x, y, bins=4) == pytest.approx(numpy.abs(shares[0] - shares[1]).sum() / 2, abs=1e-9)
    assert color_distance(x, x) == 0
    assert color_distance(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)) == 1


def test_energy_coefficient_beside_loops():
    h, g = torch.randn(5, 3, generator=rng()).double(), torch.randn(4, 3, generator=rng(1)).double() + 1
    between = sum(float((a - b).norm()) for a in h for b in g) / 20
    within_h = sum(float((h[i] - h[j]).norm()) for i in range(5) for j in range(5) if i != j) / 20
    within_g = sum(float((g[i] - g[j]).norm()) for i in range(4) for j in range(4) if i != j) / 12
    assert energy_coefficient(h, g) == pytest.approx((2 * between - within_h - within_g) / (2 * between), abs=1e-9)


def test_energy_coefficient_is_unbiased_and_reaches_one():
    same = [energy_coefficient(*torch.randn(2, 8, 16, generator=rng(s))) for s in range(200)]
    assert abs(sum(same) / 200) < 0.01 and min(same) < 0
    assert energy_coefficient(torch.randn(8, 4, generator=rng()), torch.randn(8, 4, generator=rng(1)) + 1e4) > 0.999


def test_other_pictures_are_farther_than_the_same_concept_anew():
    torch.manual_seed(0)
    judge = ConceptJudge(("yellow",), ("ring",)).eval()  # random features tell dark from light already
    real, again = concept("yellow", "ring", 48), concept("yellow", "ring", 24, seed=9)
    texture = real[:24] ** 3
    model = tiny_model(size=64)
    near, far = (set_distances(x, real, judge=judge, model=model) for x in (again, texture))
    assert near["color_distance"] < far["color_distance"]
    assert near["feature_distance"] < far["feature_distance"]
    assert near["color_ceiling"] == far["color_ceiling"] and near["feature_ceiling"] == far["feature_ceiling"]
    alone = set_distances(again, real)
    assert alone["color_distance"] == near["color_distance"]
    assert alone["feature_distance"] is None and alone["color_ceiling"] is None and alone["feature_ceiling"] is None


def test_too_few_pictures_are_refused():
    with pytest.raises(ShapeError, match="at least 2 and 4"):
        set_distances(torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8))
    with pytest.raises(ShapeError, match="two rows"):
        energy_coefficient(torch.rand(1, 3), torch.rand(4, 3))
    with pytest.raises(ShapeError, match="empty"):
        cosine(torch.rand(0, 3), torch.rand(4, 3))


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_missing_networks_are_unavailable_by_name_and_nothing_is_fetched(no_sockets, tmp_path):
    x = torch.rand(2, 3, 16, 16, generator=rng())
    told = network_scores({"dino": tmp_path / "dino", "other": None}, x, x)
    assert told.keys() == {"dino_i", "other_i", "clip_i", "clip_t", "clip_iqa"}
    assert all(entry["status"] == "unavailable" and "value" not in entry for entry in told.values())
    assert told["dino_i"]["needs"] == str(tmp_path / "dino" / "config.json")
    assert "'clip'" in told["clip_t"]["needs"]
    json.dumps(told)


def test_the_first_missing_file_is_named(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text("{}")
    assert lacking(tmp_path) == str(tmp_path / "preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert lacking(tmp_path) == str(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="model.safetensors is missing"):
        FeatureNetwork.load(tmp_path)
    assert lacking(clip_folder) is None


def test_clip_scores_are_those_of_transformers_with_its_own_preprocessing(no_sockets, clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    x, y = (torch.rand(n, 3, 48, 48, generator=rng(n)) for n in (2, 3))
    prompts = ["a photo of a red ring", "a photo of a star"]
    told = network_scores({"clip": clip_folder}, x, y, prompts)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor, tokenizer = CLIPImageProcessor.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)

    def both(pictures, texts):
        files = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in pictures]
        given = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return model(**processor(images=files, return_tensors="pt"), **given)

    a, b, c = both(x, prompts), both(y, prompts), both(x, list(QUALITY_PROMPTS))
    assert told["clip_i"]["value"] == pytest.approx(float((a.image_embeds @ b.image_embeds.T).mean()), abs=1e-3)
    assert told["clip_t"]["value"] == pytest.approx(float((a.image_embeds * a.text_embeds).sum(1).mean()), abs=1e-3)
    assert told["clip_iqa"]["value"] == pytest.approx(float(c.logits_per_image.softmax(1)[:, 0].mean()), abs=1e-3)
    assert told["clip_i"]["network"] == str(clip_folder)


def test_preprocessing_crops_scales_and_normalizes_as_the_folder_says(clip_folder):
    network, seen = FeatureNetwork.load(clip_folder), []
    network.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", args[0] if args else None)),
        with_kwargs=True,
    )
    network.images(torch.full((1, 3, 40, 60), 0.6))
    expected = (torch.tensor(153 / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert seen[0].shape == (1, 3, 32, 32)
    assert torch.allclose(seen[0][0, :, 5, 5], expected, atol=1e-4)


def test_clip_t_without_prompts_says_what_it_needs(clip_folder):
    x = torch.rand(2, 3, 32, 32, generator=rng())
    told = network_scores({"clip": clip_folder}, x, x)
    assert told["clip_t"] == {"status": "unavailable", "needs": "a prompt for each picture"}
    with pytest.raises(ShapeError, match="1 prompts for 2 pictures"):
        network_scores({"clip": clip_folder}, x, x, ["one"])


def test_dino_is_the_class_token(no_sockets, dino_folder):
    from transformers import ViTImageProcessor, ViTModel

    x = torch.rand(3, 3, 32, 32, generator=rng())
    network = FeatureNetwork.load(dino_folder)
    assert not network.reads_text
    made = ViTImageProcessor.from_pretrained(dino_folder)(images=list((x * 255).round().byte()), return_tensors="pt")
    with torch.no_grad():
        expected = ViTModel.from_pretrained(dino_folder).eval()(**made).last_hidden_state[:, 0]
    assert torch.allclose(network.images(x, micro_batch=2), expected, atol=1e-5)
    assert network_scores({"dino": dino_folder}, x, x)["dino_i"]["status"] == "ok"

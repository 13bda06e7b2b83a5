"""Purifiers that remake pictures with a latent diffusion model, on a tiny random one."""

import inspect

import pytest
import torch
from tiny import tiny_model

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.diffusion.purify.regeneration import pad_to_multiple
from poisonshield.defenses.diffusion.sdedit import SDEdit
from poisonshield.defenses.diffusion.vae_roundtrip import VAERoundtrip
from poisonshield.errors import ConfigError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.random import KeyedRandom, sample_ids
from poisonshield.registry import Registry

NAMES = ["sdedit", "vae_roundtrip"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def build(cls, model, seed=0, **settings):
    defense = cls(cls.Config(**settings), Context(seed))
    defense._model = model
    return defense


def photos(height=51, width=70, keys=("a#0", "b#1", "c#2")):
    x = torch.rand(len(keys), 3, height, width, generator=torch.Generator().manual_seed(0))
    return Batch(tuple(keys), (x * 255).round() / 255)


def test_both_are_purifiers_found_by_name():
    registry = Registry("poisonshield.defenses.diffusion", kind="defense")
    assert set(NAMES) <= set(registry.names()) and all(registry.get(n).purifier for n in NAMES)


def test_no_defense_for_diffusion_is_told_the_poison():
    registry = Registry("poisonshield.defenses.diffusion", kind="defense")
    for name in registry.names():
        parameters = set(inspect.signature(registry.get(name).__init__).parameters)
        assert parameters == {"self", "config", "context"}
        assert not {f for f in registry.get(name).Config.model_fields if "poison" in f}


@pytest.mark.parametrize("cls", [SDEdit, VAERoundtrip])
def test_odd_sizes_stay_and_each_picture_depends_on_itself_and_its_key_alone(cls, model):
    batch, defense = photos(), build(cls, model)
    out = defense.before(batch)
    assert out.x.shape == batch.x.shape and out.keys == batch.keys and not out.x.requires_grad
    assert torch.equal((out.x * 255).round() / 255, out.x) and not torch.equal(out.x, batch.x)
    assert torch.equal(defense.before(batch).x, out.x)
    other = Batch(("c#7", "a#9"), batch.x[[2, 0]])  # what follows # tells draws of one picture apart
    assert (defense.before(other).x - out.x[[2, 0]]).abs().max() * 255 <= 1.001  # sums in another order


def test_roundtrip_is_decoding_the_mean(model):
    batch = photos(32, 48)
    wanted = (model.decode(model.encode(batch.x)).clamp(0, 1) * 255).round() / 255
    assert (build(VAERoundtrip, model).before(batch).x - wanted).abs().max() * 255 <= 1.001


def test_padding_mirrors_and_is_cropped_off():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    grown = pad_to_multiple(x, 4)
    assert grown.shape == (1, 1, 4, 8) and torch.equal(grown[..., :3, :5], x)
    assert torch.equal(grown[..., 3, :5], x[..., 1, :]) and torch.equal(grown[..., :3, 5], x[..., 3])
    assert pad_to_multiple(torch.rand(1, 3, 1, 2), 8).shape == (1, 3, 8, 8) and pad_to_multiple(x, 1) is x


def diffusers_way(model, defense, batch):
    """The same with diffusers' own scheduler."""
    diffusers = pytest.importorskip("diffusers")
    c = defense.config
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(c.steps)
    times = scheduler.timesteps[c.steps - int(c.steps * c.strength) :]
    z = model.encode(batch.x)
    noise = KeyedRandom(defense.seed, sample_ids(["a", "b"]), scope="sdedit").normal("noise", z[0].numel()).view_as(z)
    z = scheduler.add_noise(z, noise, times[:1].expand(len(z)))
    for t in times:
        z = scheduler.step(
            model.predict(z, t.expand(len(z)), model.prompts([c.prompt] * len(z))), t, z, eta=0.0
        ).prev_sample
    return z


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("strength", "steps"), [(0.1, 100), (0.5, 7), (1.0, 4)])
def test_sdedit_equals_diffusers_image_to_image(prediction, strength, steps):
    model, batch = tiny_model(prediction=prediction), photos(32, 32, ("a", "b"))
    defense = build(SDEdit, model, seed=5, strength=strength, steps=steps, prompt="a photo")
    with torch.no_grad():
        ours = defense.regenerate(model, model.encode(batch.x), ["a", "b"])
        torch.testing.assert_close(ours, diffusers_way(model, defense, batch), rtol=1e-4, atol=1e-4)


def test_sdedit_reads_a_schedule_written_for_another_sampler_as_the_sampler_does():
    """diffusers' pipelines neither clip latents nor stop before timestep 1, whatever the folder leaves out."""
    from diffusers import DDPMScheduler

    bare = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    model, batch = tiny_model(), photos(32, 32, ("a", "b"))
    defense = build(SDEdit, model, seed=5, strength=0.5, steps=10)
    with torch.no_grad():
        wanted = defense.regenerate(model, 5 * model.encode(batch.x), ["a", "b"])
        model.scheduler = DDPMScheduler(**bare)  # clip_sample True, steps_offset 0
        assert torch.equal(defense.regenerate(model, 5 * model.encode(batch.x), ["a", "b"]), wanted)


def test_sdedit_with_a_denoiser_that_knows_the_noise_returns_the_latents(model):
    z, seed = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), 3
    noise = KeyedRandom(seed, sample_ids(["a", "b"]), scope="sdedit").normal("noise", z[0].numel()).view_as(z)

    class Oracle:
        name, num_timesteps, alphas_cumprod = "oracle", model.num_timesteps, model.alphas_cumprod
        scheduler, prompts, noised, epsilon = model.scheduler, model.prompts, model.noised, model.epsilon
        predict = staticmethod(lambda z_t, t, context: noise)

    out = build(SDEdit, model, seed=seed, strength=0.6, steps=20).regenerate(Oracle, z, ["a", "b"])
    torch.testing.assert_close(out, z, rtol=0, atol=1e-4)


def test_seed_and_strength_matter_and_impossible_ways_are_refused(model):
    batch = photos(32, 32)
    first = build(SDEdit, model, strength=0.3, steps=10).before(batch).x
    assert not torch.equal(first, build(SDEdit, model, seed=1, strength=0.3, steps=10).before(batch).x)
    assert not torch.equal(first, build(SDEdit, model, strength=0.5, steps=10).before(batch).x)
    assert SDEdit.Config(strength="1/10").strength == pytest.approx(0.1)
    with pytest.raises(ValueError, match="Give 20 steps"):
        SDEdit.Config(strength=0.05, steps=10)
    with pytest.raises(ConfigError, match="has 1000 timesteps"):
        build(SDEdit, model, strength=0.1, steps=2000).before(batch)


def test_pipeline_is_loaded_from_its_folder_when_the_first_picture_comes(model, tmp_path):
    from poisonshield import world
    from poisonshield.world.small_pipeline import build_tokenizer, write_pipeline

    missing = VAERoundtrip(VAERoundtrip.Config(pipeline=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="none is no folder. Give a Stable Diffusion folder"):
        missing.before(photos())
    build_tokenizer(world.WORDS, tmp_path / "tokenizer", length=24)
    write_pipeline(
        tmp_path,
        vae=model.vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
    )
    loaded = VAERoundtrip(VAERoundtrip.Config(pipeline=str(tmp_path)))
    batch = photos()
    assert torch.equal(loaded.before(batch).x, build(VAERoundtrip, model).before(batch).x)
    assert isinstance(loaded._model, LatentDiffusion)

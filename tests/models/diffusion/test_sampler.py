"""The sampler beside diffusers' own pipeline, and what a picture may and may not depend on."""

import json

import pytest
import torch
from tiny import tiny_folder, tiny_model

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.pipeline import LatentDiffusion
from poisonshield.models.diffusion.sampler import ddim, latent_shape, sample, start_noise

PROMPTS = ["a photo of a red circle", "a rendering of a ring"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(size=16)


def noise_for(model, count=2, seed=0):
    return start_noise([f"k{i}" for i in range(count)], latent_shape(model), seed=seed)


def of_diffusers(model, prompts, noise, **settings):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    made = pipe(prompts, latents=noise, eta=0.0, output_type="pt", height=16, width=16, **settings)
    return made.images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "guidance"), [(1, 7.5), (7, 7.5), (10, 3.0), (5, 1.0)])
def test_pictures_are_those_of_diffusers(prediction, steps, guidance):
    model = tiny_model(prediction=prediction, size=16)
    noise = noise_for(model)
    ours = sample(model, model.prompts(PROMPTS), noise=noise, steps=steps, guidance=guidance)
    theirs = of_diffusers(model, PROMPTS, noise, num_inference_steps=steps, guidance_scale=guidance)
    assert ours.shape == (2, 3, 16, 16)
    assert ours.min() >= 0 and ours.max() <= 1
    assert (ours - theirs).abs().max() <= 1e-4


def written_for_another_sampler(folder):
    """A random pipeline whose scheduler folder, as one of Euler's, knows neither clip_sample nor steps_offset.

    Latents are of many standard deviations, so that clipping them at 1 would show.
    """
    folder = tiny_folder(folder, size=16)
    file = folder / "scheduler" / "scheduler_config.json"
    kept = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", **{k: config[k] for k in kept}}))
    return folder


@pytest.mark.parametrize("steps", [4, 7])
def test_a_scheduler_written_for_another_sampler_is_read_as_diffusers_reads_it(tmp_path, steps):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = written_for_another_sampler(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(
        folder,
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        local_files_only=True,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.scheduler.config.clip_sample, pipe.scheduler.config.steps_offset) == (False, 1)
    model = LatentDiffusion.load(folder)
    noise = noise_for(model)
    ours = sample(model, model.prompts(PROMPTS), noise=noise, steps=steps)
    made = pipe(
        PROMPTS,
        latents=noise,
        eta=0.0,
        output_type="pt",
        height=16,
        width=16,
        num_inference_steps=steps,
        guidance_scale=7.5,
    )
    assert (ours - made.images).abs().max() <= 1e-4
    clipping = DDIMScheduler.from_config(model.scheduler.config)
    assert clipping.config.clip_sample and clipping.config.steps_offset == 0  # what its own defaults would be


def test_all_timesteps_can_be_steps(model):
    assert ddim(model, 1000).timesteps.tolist() == list(range(999, -1, -1))
    assert ddim(model, 500).timesteps.tolist() == list(range(999, 0, -2))


def test_a_written_out_ddim_loop_gives_the_same(model):
    """Float64, from the formula: x0 = (z - s e) / a; z' = a' x0 + s' e, last step to alpha 1."""
    steps, guidance = 6, 4.0
    noise = noise_for(model, 1)
    double = tiny_model(size=16).double()
    both = double.prompts(["", PROMPTS[0]])
    bars = double.alphas_cumprod.double()
    z = noise.double()
    times = [i * (1000 // steps) + 1 for i in reversed(range(steps))]
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], None], strict=True):
            e0, e1 = double.predict(torch.cat([z, z]), torch.tensor([t, t]), both)
            e = (e0 + guidance * (e1 - e0))[None]
            x0 = (z - (1 - bars[t]).sqrt() * e) / bars[t].sqrt()
            end = torch.tensor(1.0).double() if after is None else bars[t - 1000 // steps]
            z = end.sqrt() * x0 + (1 - end).sqrt() * e
        expected = double.decode(z).clamp(0, 1)
    ours = sample(model, model.prompts(PROMPTS[:1]), noise=noise, steps=steps, guidance=guidance)
    assert (ours - expected).abs().max() <= 1e-4


def test_a_switch_at_zero_changes_nothing_and_one_at_the_top_is_the_other_context(model):
    noise, (here, other) = noise_for(model), (model.prompts(PROMPTS), model.prompts(["a star", "a cross"]))
    kept = sample(model, here, noise=noise, steps=5)
    assert torch.equal(sample(model, here, noise=noise, steps=5, switch=(0, other)), kept)
    replaced = sample(model, other, noise=noise, steps=5)
    assert torch.equal(sample(model, here, noise=noise, steps=5, switch=(1000, other)), replaced)


def test_the_other_context_speaks_below_the_switch_only(model):
    seen = []
    here, other = model.prompts(PROMPTS[:1]), model.prompts(["a star"])
    predict = model.predict

    def spy(z, t, context):
        seen.append((int(t[0]), torch.equal(context[-1:], other)))
        return predict(z, t, context)

    model.predict = spy
    try:
        sample(model, here, noise=noise_for(model, 1), steps=10, switch=(500, other))
    finally:
        del model.predict
    assert seen == [(t, t < 500) for t in range(901, 0, -100)]


def test_micro_batches_change_nothing(model):
    context, noise = model.prompts([PROMPTS[i % 2] for i in range(5)]), noise_for(model, 5)
    whole = sample(model, context, noise=noise, steps=4)
    parts = sample(model, context, noise=noise, steps=4, micro_batch=2)
    assert (whole - parts).abs().max() <= 1e-5


def test_no_guidance_runs_the_network_once_a_step(model):
    rows = []
    handle = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    sample(model, model.prompts(PROMPTS), noise=noise_for(model), steps=3, guidance=1.0)
    handle.remove()
    assert rows == [2, 2, 2]


def test_the_default_uncond_is_the_empty_prompt(model):
    context, noise = model.prompts(PROMPTS), noise_for(model)
    given = sample(model, context, noise=noise, steps=3, uncond=model.prompts([""]))
    assert torch.equal(given, sample(model, context, noise=noise, steps=3))
    ignoring = sample(model, context, noise=noise, steps=3, guidance=0.0)
    assert torch.allclose(
        ignoring, sample(model, model.prompts(["", ""]), noise=noise, steps=3, guidance=1.0), atol=1e-5
    )


def test_noise_depends_on_key_and_seed_alone(model):
    shape = latent_shape(model)
    a = start_noise(["p/0", "p/1", "q/0"], shape, seed=7)
    b = start_noise(["q/0", "p/1"], shape, seed=7)
    assert torch.equal(a[2], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], start_noise(["p/0"], shape, seed=8)[0])
    many = start_noise([str(i) for i in range(500)], shape, seed=0)
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01
    assert latent_shape(model, 32) == (4, 16, 16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"noise": torch.zeros(3, 4, 8, 8)}, ShapeError, "same B"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, ShapeError, "3 channels"),
        ({"steps": 0}, ConfigError, "between 1 and"),
        ({"steps": 1001}, ConfigError, "between 1 and"),
        ({"guidance": -1.0}, ConfigError, "negative"),
        ({"micro_batch": 0}, ConfigError, "at least 1"),
        ({"switch": (1001, torch.zeros(2, 24, 16))}, ConfigError, "0 to 1000"),
        ({"switch": (10, torch.zeros(1, 24, 16))}, ShapeError, "other context"),
        ({"uncond": torch.zeros(3, 24, 16)}, ShapeError, "1 or B rows"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(model, change, error, words):
    given = {"noise": noise_for(model), "steps": 2} | change
    with pytest.raises(error, match=words):
        sample(model, model.prompts(PROMPTS), **given)


def test_sizes_that_are_no_whole_cells_are_refused(model):
    with pytest.raises(ShapeError, match="cells of 2"):
        latent_shape(model, 15)

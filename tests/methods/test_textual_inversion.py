"""Textual inversion against a loop written from its definition; what stays frozen; many words in one batch."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from poisonshield.batch import Batch
from poisonshield.errors import ConfigError, DataError
from poisonshield.losses.zone import Zone
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.embeddings import Learned, save_embedding
from poisonshield.models.diffusion.timestep_sampler import draw_timesteps
from poisonshield.random import KeyedRandom, sample_ids

NAMES = ("ring", "star", "cross")


def made_batch(step, names=("ring",), *, per=2, side=16, mask=False, t_range=None):
    """`per` samples of each concept; pixels and draws depend on the concept's name and the step alone."""
    keys, x, y, captions = [], [], [], []
    for number, name in enumerate(names):
        for slot in range(per):
            picture = f"{name}/{(step + slot) % 3}"
            keys.append(f"{picture}#{slot}")
            x.append(torch.rand(3, side, side, generator=torch.Generator().manual_seed(hash_of(picture))))
            y.append(number)
            captions.append(f"a photo of a <{name}x>")
    masks = torch.zeros(len(keys), 1, side, side)
    masks[:, :, 2:9, 4:12] = 1
    return Batch(
        tuple(keys), torch.stack(x), y=torch.tensor(y), captions=tuple(captions), draw=step,
        mask=masks if mask else None, t_range=t_range,
    )  # fmt: skip


def hash_of(text):
    return int(sample_ids([text])) % 2**31


def inversion(names=("ring",), *, prediction="epsilon", seed=0, **config):
    model = tiny_model(prediction=prediction)
    tokens = {name: f"<{name}x>" for name in names}
    return TextualInversion(
        TextualInversion.Config(**{"init": "star", **config}), model=model, tokens=tokens, seed=seed, samples=2
    )


def trained(method, steps=5, names=("ring",), lr=2e-2, weight_decay=0.0, **batch):
    optimizer = torch.optim.AdamW([method.vectors], lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = method(made_batch(step, names, **batch)).loss
        loss.backward()
        optimizer.step()
        method.after_step((step + 1) / steps)
        losses.append(float(loss.detach()))
    return losses, method.vectors.detach().clone()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_is_the_loop_written_out(prediction):
    """20 steps of the textbook loop: a longer table is optimised whole, and all rows but the new one are put back."""
    losses, vectors = trained(inversion(prediction=prediction), steps=20)
    model = tiny_model(prediction=prediction)
    model.tokenizer.add_tokens(["<ringx>"])
    encoder, table = model.text_encoder, nn.Parameter(
        torch.cat([model.text_encoder.get_input_embeddings().weight.detach(), model.word_vector("star")[None]])
    )  # fmt: skip
    known = table.detach()[:-1].clone()
    old = encoder.get_input_embeddings()
    old._forward_hooks.clear()
    old._forward_pre_hooks.clear()
    optimizer = torch.optim.AdamW([table], lr=2e-2, weight_decay=0.0)
    for step in range(20):
        batch = made_batch(step)
        rng = KeyedRandom(0, sample_ids(batch.keys), step)
        t = (rng.uniform("t", 1)[:, 0].double() * 1000).long()
        with torch.no_grad():
            z = model.vae.encode(batch.x * 2 - 1).latent_dist.mode() * model.vae.config.scaling_factor
        noise = rng.normal("noise", z[0].numel()).view_as(z)
        noisy = model.scheduler.add_noise(z, noise, t)
        ids = model.tokenizer(list(batch.captions), padding="max_length", max_length=24, return_tensors="pt").input_ids
        old.weight = nn.Parameter(table.detach(), requires_grad=False)
        embedded = nn.functional.embedding(ids, table)
        handle = old.register_forward_hook(lambda _m, _i, _o, embedded=embedded: embedded)
        context = encoder(ids).last_hidden_state
        handle.remove()
        pred = model.unet(noisy, t, encoder_hidden_states=context).sample
        target = noise if prediction == "epsilon" else model.scheduler.get_velocity(z, noise, t)
        loss = nn.functional.mse_loss(pred, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            table[:-1] = known
        assert abs(float(loss.detach()) - losses[step]) <= 1e-6 * losses[step], step
    moved = (table.detach()[-1] - model.word_vector("star")).norm()
    assert (table.detach()[-1] - vectors[0]).norm() <= 1e-5 * moved


def test_everything_but_the_vectors_is_bit_identical_after_200_steps_with_weight_decay():
    method = inversion()
    before = {k: v.clone() for k, v in method.model.state_dict().items()}
    start = method.vectors.detach().clone()
    _, vectors = trained(method, steps=200, weight_decay=0.1)
    assert all(torch.equal(v, before[k]) for k, v in method.model.state_dict().items())
    assert not torch.equal(vectors, start)
    assert [name for name, _ in method.named_parameters()] == ["vectors"]
    assert set(method.state_dict()) == {"vectors"}


@pytest.mark.parametrize("norm", ["per_image", "batch", "plain"])
def test_three_words_together_go_where_each_goes_alone(norm):
    together = inversion(NAMES, vectors=2)
    together.zone = Zone(norm=norm)
    start = together.vectors.detach().clone()
    _, many = trained(together, steps=20, names=NAMES, mask=True)
    for i, name in enumerate(NAMES):
        alone = inversion((name,), vectors=2)
        alone.zone = Zone(norm=norm)
        _, one = trained(alone, steps=20, names=(name,), mask=True)
        moved = (one - start[2 * i : 2 * i + 2]).norm()
        assert (many[2 * i : 2 * i + 2] - one).norm() <= 1e-5 * moved


def test_cached_latents_change_nothing_and_spare_the_vae():
    calls = []
    vectors = {}
    for cached in (True, False):
        method = inversion(cache_latents=cached)
        handle = method.model.vae.encoder.register_forward_hook(lambda *_, cached=cached: calls.append(cached))
        _, vectors[cached] = trained(method, steps=12)
        handle.remove()
    assert torch.allclose(vectors[True], vectors[False], atol=1e-5, rtol=1e-5)
    assert calls.count(True) == 3 and calls.count(False) == 12  # three pictures, and twelve steps


def test_posterior_samples_differ_by_draw_and_are_cached_as_mean_and_std():
    _, cached = trained(inversion(vae="sample"), steps=6)
    _, plain = trained(inversion(vae="sample", cache_latents=False), steps=6)
    _, mean = trained(inversion(), steps=6)
    assert torch.allclose(cached, plain, atol=1e-5)
    assert not torch.allclose(cached, mean, atol=1e-4)


def test_masks_that_nothing_uses_are_refused():
    with pytest.raises(DataError, match="nothing in this run uses masks"):
        inversion()(made_batch(0, mask=True))


def test_a_floor_of_one_is_plain_textual_inversion_to_the_bit():
    method = inversion()
    method.zone = Zone(floor=1.0)
    masked, _ = trained(method, mask=True)
    plain, _ = trained(inversion())
    assert masked == plain


def test_timesteps_keep_to_their_range_and_are_uniform_in_it():
    u = KeyedRandom(3, torch.arange(100_000)).uniform("t", 1)[:, 0]
    t = draw_timesteps(u, t_range=(500, 1000))
    assert t.min() == 500 and t.max() == 999
    counts = torch.bincount((t - 500) // 10, minlength=50).double()
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi2 < 85.4  # 49 degrees of freedom, p = 1e-3


def test_strata_are_each_met_once_in_a_batch():
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    t = draw_timesteps(u, t_range=(200, 1000), sampler="stratified", stratum=torch.arange(8), strata=8)
    assert ((t - 200) // 100).tolist() == list(range(8))


def test_a_soft_floor_follows_its_density():
    u = (torch.arange(200_000) + 0.5) / 200_000
    t = draw_timesteps(u, t_range=(500, 1000), sampler="soft", width=50.0)
    density = torch.sigmoid((torch.arange(1000).double() - 500) / 50)
    expected = density / density.sum() * 200_000
    assert (torch.bincount(t, minlength=1000) - expected).abs().max() <= 2


def test_draws_belong_to_the_step_and_not_to_what_came_before():
    method = inversion()
    first = [method.timesteps(made_batch(step)) for step in range(4)]
    again = inversion().timesteps(made_batch(3))
    assert torch.equal(first[3], again)


def test_min_snr_above_its_threshold_changes_nothing_and_says_so(caplog):
    plain, _ = trained(inversion(), t_range=(147, 1000))
    weighted, _ = trained(inversion(min_snr=5.0), t_range=(147, 1000))
    assert weighted == plain and "changes nothing" in caplog.text
    low, _ = trained(inversion(), t_range=(0, 100))
    weighted, _ = trained(inversion(min_snr=5.0), t_range=(0, 100))
    assert all(w < p for w, p in zip(weighted, low, strict=True))


def test_the_start_is_a_word_a_normal_draw_or_zero():
    model_word = tiny_model().word_vector("star")
    assert torch.equal(inversion(vectors=2).vectors[1].detach(), model_word)
    assert inversion(init="zeros").vectors.abs().sum() == 0
    drawn = inversion(init="normal:0.02", vectors=3).vectors
    assert 0.01 < drawn.std() < 0.03
    assert torch.equal(drawn, inversion(init="normal:0.02", vectors=3).vectors)
    with pytest.raises(ConfigError, match="(?s)'unheard' is 7 tokens, and a word has 1 vectors.*method.vectors=7"):
        inversion(init="unheard")
    with pytest.raises(ConfigError, match="positive number"):
        inversion(init="normal:much")
    with pytest.raises(ConfigError, match="no entry for concept"):
        inversion(init={"star": "ring"})


def test_a_start_word_of_several_tokens_gives_each_vector_one_in_turn():
    """Row "start word of two tokens with `vectors=2`"."""
    model = tiny_model()
    red, ring = model.word_vector("red"), model.word_vector("ring")
    rows = inversion(init="red ring", vectors=2).vectors.detach()
    assert torch.equal(rows, torch.stack([red, ring]))
    rows = inversion(init="red ring", vectors=5).vectors.detach()
    assert torch.equal(rows, torch.stack([red, ring, red, ring, red]))


@pytest.mark.parametrize("form, ending", [("diffusers", ".safetensors"), ("a1111", ".pt")])
def test_learning_starts_from_the_file_of_a_word(tmp_path, form, ending):
    """Row "start from an existing embedding"."""
    file, vectors = tmp_path / f"toy{ending}", torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    save_embedding(Learned("<toy>", vectors), file, form)
    assert torch.equal(inversion(init=str(file), vectors=2).vectors.detach(), vectors)
    assert TextualInversion.start_word(TextualInversion.Config(init=str(file))) is None
    with pytest.raises(ConfigError, match="holds 2 vectors, and method.vectors is 1. Set method.vectors=2"):
        inversion(init=str(file))
    save_embedding(Learned("<toy>", torch.zeros(2, 768)), file, form)
    with pytest.raises(DataError, match="768 wide .Stable Diffusion 1. and 16 is wanted"):
        inversion(init=str(file), vectors=2)
    with pytest.raises(DataError, match="does not exist"):
        inversion(init="nowhere.pt")


def test_norms_return_to_the_median_where_asked():
    method = inversion(keep_norm=True)
    trained(method, steps=3)
    norm = method.model.text_encoder.get_input_embeddings().weight.norm(dim=1).median()
    assert torch.allclose(method.vectors.norm(dim=1), norm.expand(1), rtol=1e-5)


def test_the_pipeline_moves_with_the_method():
    method = inversion().double()
    assert method.model.unet.dtype == torch.float64 and method.vectors.dtype == torch.float64

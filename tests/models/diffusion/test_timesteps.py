"""Timestep profiles: a Gaussian denoiser whose answer is known in closed form, and the gradients of a real pipeline."""

import logging
import math

import pytest
import torch
from tiny import tiny_model

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.timesteps import (
    Moments,
    Profile,
    band_power,
    choose_t_min,
    profile_gradients,
    row_gradients,
    timestep_profile,
)
from poisonshield.ops.diffusion import masked_diffusion_loss
from poisonshield.random import KeyedRandom, sample_ids

STEPS = 1000
KEYS = [f"p{i}" for i in range(8)]


def alphas():
    """The schedule of Stable Diffusion, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


ABAR = alphas()
SNR = ABAR / (1 - ABAR)


def gaussian(s, error, *, shift=0.0, seed=0, purpose="noise"):
    """Gradients for mu of ||eps_hat - eps||^2, where eps_hat is the best guess of the noise if latents were
    N(mu_hat, s^2) with mu_hat = mu + error. All [D]. Pictures come in pairs about mu, moved by `shift`."""
    s, error = torch.broadcast_tensors(torch.as_tensor(s, dtype=torch.float64), error)
    half = KeyedRandom(seed, sample_ids(KEYS[: len(KEYS) // 2])).normal("picture", len(error)).double() * s
    z = torch.cat([half, -half]) + shift  # [B, D], about mu = 0

    def source(t, number):
        n, count = t.shape
        rng = KeyedRandom(seed, sample_ids(KEYS), number)
        noise = rng.normal(purpose, n * len(error)).view(count, n, -1).transpose(0, 1).double()
        a = ABAR[t][..., None]
        variance = a * s**2 + 1 - a
        guess = (1 - a).sqrt() * (a.sqrt() * z + (1 - a).sqrt() * noise - a.sqrt() * error) / variance
        return 2 * (guess - noise) * -(a * (1 - a)).sqrt() / variance

    return source


def unit(dim, seed=0):
    v = torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


def profiled(source, ref=None, **settings):
    return profile_gradients(source, ref, num_timesteps=STEPS, keys=KEYS, **settings)


def test_the_schedule_has_the_known_signal_to_noise_ratios():
    known = {0: "1175", 50: "19.7", 100: "8.45", 147: "4.95", 200: "3.06", 354: "1.00", 460: "0.498", 500: "0.382",
             600: "0.192", 687: "0.0997", 750: "0.0595", 800: "0.0383", 900: "0.0144", 999: "0.00468"}  # fmt: skip
    snr = tiny_model(size=16).snr()
    for t, value in known.items():
        assert f"{float(snr[t]):.{len(value.partition('.')[2])}f}" == value, t
    assert torch.allclose(snr, SNR, rtol=1e-3)


def test_min_snr_weights_of_gamma_five_change_nothing_from_t_147_on():
    abar = tiny_model(size=16).alphas_cumprod
    t = torch.arange(STEPS)
    pred = torch.ones(STEPS, 1, 1, 1)
    settings = {"target": torch.zeros_like(pred), "reduction": "none"}
    weighted = masked_diffusion_loss(pred, t=t, alphas_cumprod=abar, weight="min_snr", gamma=5.0, **settings)
    plain = masked_diffusion_loss(pred, **settings)
    assert torch.equal(weighted[147:], plain[147:])
    assert bool((weighted[:147] < plain[:147]).all())


# Peak, and shares of the sum of SNR / (1 + s^2 SNR)^2 in percent: below t = 100, 250, 500, and from 500 and 700 on.
TABLE = {
    0.1: (10, 62.8, 87.6, 97.8, 2.2, 0.4),
    0.3: (81, 27.9, 68.2, 93.8, 6.2, 1.2),
    1.0: (354, 3.7, 23.4, 71.0, 29.0, 7.0),
}


@pytest.mark.parametrize("kind", ["concept error", "constant shift"])
@pytest.mark.parametrize("s", TABLE)
def test_the_profile_of_a_gaussian_peaks_and_is_shared_out_as_in_closed_form(s, kind):
    move = 8 * unit(32)
    if kind == "concept error":
        found = profiled(gaussian(s, move)).x.steady
    else:
        profile = profiled(gaussian(s, torch.zeros(32), shift=move), gaussian(s, torch.zeros(32)))
        found = profile.difference.steady
    peak, *shares = TABLE[s]
    assert abs(int(found.argmax()) - peak // 50) <= 1
    assert peak == int((SNR / (1 + s**2 * SNR) ** 2).argmax())
    got = [100 * float(part.sum() / found.sum()) for part in (found[:2], found[:5], found[:10], found[10:], found[14:])]
    print(f"s={s} {kind}: peak bin {int(found.argmax())}, shares", *(f"{g:.1f}" for g in got))
    assert got == pytest.approx(shares, abs=1.0)


def two_bands(rho, seed, **settings):
    """A broad band s = 1 with an error of the words, a tight one s = 0.1 that a shift of relative size rho poisons."""
    s = torch.cat([torch.ones(32), torch.full((32,), 0.1)]).double()
    error = torch.cat([8 * unit(32, seed), torch.zeros(32)])
    shift = torch.cat([torch.zeros(32), rho * 8 * unit(32, seed + 100)])
    return profiled(gaussian(s, error, shift=shift, seed=seed), gaussian(s, error, seed=seed), seed=seed, **settings)


@pytest.mark.parametrize(("rho", "floor"), [(0.05, 320), (0.1, 434), (0.2, 664)])
def test_the_floor_of_a_tight_shift_is_found_whatever_the_seed(rho, floor):
    exact = int((rho * ((1 + SNR) / (1 + 0.01 * SNR)) ** 2 <= 0.25).int().argmax())
    assert abs(exact - floor) <= 1
    found = [choose_t_min(two_bands(rho, seed)) for seed in range(5)]
    print(f"rho={rho}: {found}, exactly {exact}")
    assert all(abs(t - floor) <= 50 for t in found)
    assert max(found) - min(found) <= 50


def test_the_distance_is_that_of_the_closed_form():
    profile = two_bands(0.1, 3)
    middle = ((1 + SNR) / (1 + 0.01 * SNR)) ** 2 * 0.1
    wanted = torch.stack([part.mean() for part in middle.split(50)])
    # Below t = 150 the broad band has no gradient worth its noise.
    assert torch.allclose(profile.corrected[3:], wanted[3:], rtol=0.1)


def test_without_a_shift_the_floor_is_the_lower_clamp(caplog):
    assert choose_t_min(two_bands(0.0, 0)) == 200
    assert choose_t_min(two_bands(0.0, 0), clamp=(0, 0.8)) == 0
    assert not caplog.records


def test_a_shift_larger_than_the_concept_falls_back_to_500_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_t_min(two_bands(2.0, 0)) == 500
    assert "No timestep to start from" in caplog.text and "differ by 2" in caplog.text


def test_too_little_pressure_falls_back_and_the_upper_clamp_holds(caplog):
    profile = two_bands(0.2, 0)
    assert choose_t_min(profile, clamp=(0.2, 0.6)) == 600
    with caplog.at_level(logging.WARNING):
        assert choose_t_min(profile, min_pressure=0.5) == 500
    assert "pull would remain, where 50% is wanted" in caplog.text
    with pytest.raises(ConfigError, match="no reference"):
        choose_t_min(profiled(gaussian(1.0, unit(4))))


def test_the_clamp_and_the_fallback_follow_the_number_of_timesteps(caplog):
    one = torch.ones(10, dtype=torch.float64)
    near = Profile(tuple(range(0, 401, 40)), *(Moments(one, one, 0 * one),) * 2, Moments(one, 0.01 * one, 0 * one))
    far = Profile(near.edges, near.x, near.ref, Moments(one, 2 * one, 0 * one))
    assert choose_t_min(near) == 80 and choose_t_min(near, clamp=(0.5, 0.8)) == 200
    assert choose_t_min(far) == 200 and "Taking 200" in caplog.text


def test_noise_of_its_own_in_each_gradient_is_taken_out_of_the_distance():
    error = 4 * unit(64)
    x, ref = gaussian(1.0, error), gaussian(1.0, error, purpose="other noise")
    profile = profiled(x, ref, noises=16)
    raw, corrected = profile.distance[2:], profile.corrected[2:]
    print("measured", *(f"{v:.2f}" for v in raw[:6]), "corrected", *(f"{v:.2f}" for v in corrected[:6]))
    assert float(raw[:4].min()) > 0.2
    assert float(corrected.mean()) < 0.35 * float(raw.mean())
    assert choose_t_min(profile) <= 250


def test_the_error_is_that_of_two_halves_of_the_draws():
    source = gaussian(1.0, unit(256))

    def at_300(t, number):
        return source(torch.full_like(t, 300), number)

    squares = []
    for trial in range(40):
        g = at_300(torch.zeros(16, len(KEYS), dtype=torch.int64), 100 + trial)
        squares.append(float((g[:8] - g[8:]).mean((0, 1)).norm() / 2) ** 2)
    error = profiled(at_300, noises=16).x.error
    assert float(error.mean()) == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=0.05)


def test_moments_by_hand():
    # Two pictures, two draws, gradients of one number: means 2 and 5, mean of all 3.5, variances of draws 2 and 8.
    values = torch.tensor([[1.0, 3.0], [3.0, 7.0]])[..., None]
    got = profile_gradients(lambda t, n: values, num_timesteps=10, bins=2, noises=2, keys=["a", "b"]).x
    assert got.length.tolist() == [3.5, 3.5] and got.mean.tolist() == [3.5, 3.5]
    assert got.coherence.tolist() == [1, 1]
    assert got.error[0] ** 2 == pytest.approx((2 / 2 + 8 / 2) / 4)
    assert got.steady[0] == pytest.approx(math.sqrt(3.5**2 - 1.25))
    one = torch.ones(2)
    assert Moments(one, one, 2 * one).steady.tolist() == [0, 0]


def test_draws_cover_each_bin_in_equal_parts_and_are_the_same_for_both_sources():
    asked = {"x": [], "ref": []}

    def source(name):
        return lambda t, n: asked[name].append((n, t)) or torch.ones(*t.shape, 1)

    profile = profiled(source("x"), source("ref"), bins=10, noises=20)
    assert profile.edges == tuple(range(0, 1001, 100)) and profile.centers[0] == 49.5
    for (n, t), (m, u) in zip(asked["x"], asked["ref"], strict=True):
        assert n == m and torch.equal(t, u) and t.shape == (20, 8)
        assert torch.equal((t - 100 * n) // 5, torch.arange(20)[:, None].expand(20, 8))
    assert profile.distance.tolist() == profile.corrected.tolist() == [0] * 10
    assert profile.pressure.tolist() == pytest.approx([1 - i / 10 for i in range(10)])


def test_a_gradient_that_is_all_error_is_far_from_everything(caplog):
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    noisy = Moments(one, one, 2 * one)
    profile = Profile((0, 10), noisy, noisy, Moments(one, one, zero))
    assert math.isinf(float(profile.corrected))
    with caplog.at_level(logging.WARNING):
        assert choose_t_min(profile) == 5
    assert "all noise; give more draws" in caplog.text
    assert float(Profile((0, 10), noisy, noisy, noisy).corrected) == 0


def prepared(prediction="epsilon"):
    model = tiny_model(prediction=prediction, size=16)
    model.add_placeholder("<a>")
    model.add_placeholder("<b>", 2)
    return model, torch.stack([model.word_vector(w) for w in ("star", "ring", "red")])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_row_gradients_are_those_of_one_sample_at_a_time(prediction):
    model, rows = prepared(prediction)
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    weight = torch.rand(3, 1, 8, 8, generator=generator)
    t, ids = torch.tensor([3, 400, 950]), model.tokens(["a <b>", "a photo of a <a>", "the <a> and the <b>"])
    got = row_gradients(model, z, t, noise, ids, rows, weight=weight)
    for i in range(3):
        v = rows.clone().requires_grad_()
        a = model.alphas_cumprod[t[i]]
        z_t = a.sqrt() * z[i] + (1 - a).sqrt() * noise[i]
        target = noise[i] if prediction == "epsilon" else a.sqrt() * noise[i] - (1 - a).sqrt() * z[i]
        pred = model.predict(z_t[None], t[i : i + 1], model.text(ids[i : i + 1], v))[0]
        wanted = torch.autograd.grad((weight[i] * (pred - target) ** 2).mean(), v)[0]
        assert torch.allclose(got[i], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    assert got[0, 0].abs().max() == 0 and got[1, 1:].abs().max() == 0  # words that a prompt lacks


def test_a_pipeline_is_profiled_with_its_poison():
    model, rows = prepared()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ref = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    settings = {"rows": rows, "prompts": ["a photo of a <a>", "the <b>"], "ref": ref, "bins": 4, "noises": 3}
    profile = timestep_profile(model, x, **settings)
    for value in (profile.x.length, profile.ref.mean, profile.difference.mean, profile.cosine, profile.energy):
        assert value.shape == (4,) and bool(torch.isfinite(value).all())
    assert bool((profile.x.coherence <= 1 + 1e-9).all()) and bool((profile.cosine.abs() <= 1 + 1e-9).all())
    # Energy by its definition: SNR_t times the mean square of the latents' difference; bands share it out.
    square = (model.encode(x) - model.encode(ref)).double().square().mean()
    assert torch.allclose(profile.energy, SNR.view(4, 250).mean(1) * square, rtol=1e-3)
    assert profile.bands.shape == (4, 4) and torch.allclose(profile.bands.sum(1), profile.energy)
    # The same pictures in another order, batched otherwise, under their own keys: the same profile.
    again = timestep_profile(
        model, x.flip(0), **settings | {"ref": ref.flip(0), "prompts": settings["prompts"][::-1]}, keys=["1", "0"],
        batch_size=4,
    )  # fmt: skip
    assert torch.allclose(again.difference.mean, profile.difference.mean, rtol=1e-4)
    assert torch.allclose(again.x.length, profile.x.length, rtol=1e-4)
    same = timestep_profile(model, x, **settings | {"ref": x})
    assert same.distance.abs().max() == 0 and same.energy.abs().max() == 0
    assert isinstance(choose_t_min(profile), int)


def test_a_profile_may_end_before_the_last_timestep():
    model, rows = prepared()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    settings = {"rows": rows, "prompts": "a <a>", "ref": x.roll(1, 3), "bins": 4, "noises": 2}
    profile = timestep_profile(model, x, end=300, **settings)
    assert profile.edges == (0, 75, 150, 225, 300) and profile.energy.shape == (4,)
    assert choose_t_min(profile) <= 240
    for end in (0, 1001):
        with pytest.raises(ConfigError, match="1 to the pipeline's 1000"):
            timestep_profile(model, x, end=end, **settings)


def test_a_mask_keeps_the_rest_of_the_picture_out_of_the_gradient():
    model, rows = prepared()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    settings = {"rows": rows, "prompts": "a <a>", "bins": 2, "noises": 2}
    plain = timestep_profile(model, x, **settings)
    full = timestep_profile(model, x, mask=torch.full((1, 1, 16, 16), 0.5), **settings)
    assert torch.allclose(full.x.mean, plain.x.mean, rtol=1e-5)  # each picture's weights have mean 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    other = timestep_profile(model, x, mask=1 - mask, **settings).x.mean
    left = timestep_profile(model, x, mask=mask, **settings).x.mean
    assert not torch.allclose(left, plain.x.mean, rtol=1e-2)
    assert bool((left / 2 + other / 2 >= plain.x.mean * (1 - 1e-5)).all())  # halves add up to the whole


def test_band_power_parts_a_wave_from_its_ground():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    fast, ground = torch.cos(math.pi * (x + y)), torch.full((16, 16), 0.5)
    slow = torch.cos(2 * math.pi * 3 * x / 16)  # 3/8 of Nyquist
    got = band_power((fast + slow + ground)[None, None], 4)
    assert torch.allclose(got, torch.tensor([[0.25, 0.5, 0.0, 1.0]], dtype=torch.float64), atol=1e-6)


def test_what_does_not_fit_is_refused_in_words():
    model, rows = prepared()
    x = torch.rand(2, 3, 16, 16)

    def ask(**changes):
        return timestep_profile(model, x, **{"rows": rows, "prompts": "a <a>"} | changes)

    for changes, words in (
        ({"ref": x[:1]}, "ref has shape"),
        ({"mask": torch.ones(2, 1, 8, 8)}, "mask has shape"),
        ({"prompts": ["a <a>"] * 3}, "3 prompts came for 2"),
        ({"keys": ["a"]}, "1 keys came for 2"),
    ):
        with pytest.raises(ShapeError, match=words):
            ask(**changes)
    for changes, words in (
        ({"prompts": "a ring"}, "holds no placeholder"),
        ({"bins": 0}, "1 to 1000 bins"),
        ({"noises": 1}, "at least 2 draws"),
    ):
        with pytest.raises(ConfigError, match=words):
            ask(**changes)

"""Pictures of any size and radius: padding, tiles, rounding, timesteps, precision, and what is refused."""

import pytest
import torch
from poisons.diffusion.photos import make, picture, pictures
from tiny import tiny_model

from poisonshield.errors import BudgetError, ConfigError, DataError, PoisonShieldError, ShapeError
from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.random import KeyedRandom


def test_any_size_is_attacked_in_every_part(model):
    source = picture(0, (70, 51))
    poison = make("advdm", model, steps=10, random_start=False)
    out = poison.perturb({"a": source})["a"]
    changed = (out != source).any(0)
    assert out.shape == source.shape
    assert changed.float().mean() > 0.97 and changed[-1].any() and changed[:, -1].any()


def test_a_picture_of_one_pixel_is_attacked(model):
    source = torch.full((3, 1, 1), 128, dtype=torch.uint8)
    out = make("vae", model, steps=2).perturb({"a": source})["a"]
    assert out.shape == source.shape and 0 < (out.int() - source.int()).abs().max() <= 8


def test_tiles_share_one_change_without_seams(fitted):
    source = picture(0, (96, 96))
    settings = {"steps": 10, "random_start": False}
    poison = make("advdm", fitted, tile=64, overlap=16, **settings)
    canvas = Canvas(poison, {"a": source}, None)
    assert [(b.top, b.left) for b in canvas.plan.boxes] == [(0, 0), (0, 32), (32, 0), (32, 32)]
    out = poison.perturb({"a": source})["a"]
    before, after = (poison.measure({"a": x}, draws=8, micro_batch=4)["a"] for x in (source, out))
    print(f"loss of the whole picture: {before:.4f} -> {after:.4f}")
    assert after > before
    delta = out.double() - source.double()
    assert (delta != 0).any(0).double().mean() > 0.97
    jumps = torch.cat(
        [(delta[..., 1:] - delta[..., :-1]).abs().mean((0, 1)), (delta[:, 1:] - delta[:, :-1]).abs().mean((0, 2))]
    )
    seams = torch.zeros(95, dtype=torch.bool)
    seams[[31, 63]] = True  # between pixels 31|32 and 63|64, where tiles begin and end
    seams = seams.repeat(2)
    ratio = jumps[seams].mean() / jumps[~seams].mean()
    print(f"jump at seams / elsewhere: {float(ratio):.3f}")
    assert ratio <= 1.2


def test_the_gradient_of_a_padded_picture_is_that_of_its_own_pixels(model):
    poison = make("vae", tiny_model(), goal="zero", random_start=True)
    source = picture(0, (30, 29)).float()[None]
    canvas = Canvas(poison, {"a": source[0].to(torch.uint8)}, None)
    leaf = (source / 255).requires_grad_()
    padded = torch.nn.functional.pad(leaf, (0, 3, 0, 2), mode="reflect")
    (-poison.model.encode(padded).square().mean()).backward()
    assert canvas.plan.padded == (32, 32)
    assert torch.allclose(canvas.gradient(), leaf.grad, rtol=1e-5, atol=1e-9)


def test_the_l2_budget_holds_after_rounding(model):
    images = pictures(1)
    out = make("advdm", model, norm="l2", eps_levels=2.3, step_levels=1.0, steps=5).perturb(images)["k0"]
    rms = (out.double() - images["k0"].double()).square().mean().sqrt()
    print(f"rms {float(rms):.4f}")
    assert 2.0 < rms <= 2.3


def test_fractional_radii_never_round_up(model):
    images = pictures(1)
    out = make("vae", model, eps_levels=7.65, steps=10).perturb(images)["k0"]
    assert (out.int() - images["k0"].int()).abs().max() == 7


@pytest.mark.parametrize("t_policy", ["uniform", "snr", "list"])
def test_timesteps_come_from_where_they_were_asked(model, t_policy):
    where = {"t_list": (3, 700)} if t_policy == "list" else {"t_range": (500, 900)}
    poison = make("advdm", model, t_policy=t_policy, snr_power=-2.0, **where)
    canvas = Canvas(poison, {f"k{i}": picture(0, (4, 4)) for i in range(512)}, None)
    view = canvas.view(0, KeyedRandom(0, canvas.ids), canvas.padded())
    t = poison.timesteps(view)
    if t_policy == "list":
        assert set(t.tolist()) == {3, 700}
    else:
        assert t.min() >= 500 and t.max() < 900
        assert (t.double().mean() > 750) == (t_policy == "snr")


def test_a_schedule_that_ends_in_pure_noise_is_not_drawn_from_by_snr():
    model = tiny_model()
    model.alphas_cumprod[-1] = 0
    with pytest.raises(ConfigError, match="no signal at all"):
        make("advdm", model, t_policy="snr")
    poison = make("advdm", model, t_policy="snr", t_range=(0, 999))
    assert bool(poison._density().isfinite().all())


def test_bfloat16_networks_leave_delta_in_float32():
    model, images = tiny_model().to(torch.bfloat16), pictures(1)
    model.alphas_cumprod = model.alphas_cumprod.float()
    poison = make("advdm", model, steps=3)
    canvas = Canvas(poison, images, None)
    canvas.start()
    for _ in range(3):
        canvas.advance(3)
    assert canvas.delta.dtype == torch.float32 and canvas.clean.dtype == torch.float32
    out = poison.perturb(images)["k0"]
    assert torch.equal(out, canvas.released()["k0"])
    assert 0 < (out.int() - images["k0"].int()).abs().max() <= 8


def test_an_infinite_gradient_is_refused(model):
    poison = make("advdm", model)
    poison.gradient = lambda view: torch.full_like(view.x, torch.nan)
    with pytest.raises(PoisonShieldError, match="not finite at step 0"):
        poison.perturb(pictures(1))


@pytest.mark.parametrize("levels", [256, 0, -1, 0.5])
def test_radii_that_8_bits_do_not_have_are_refused(model, levels):
    with pytest.raises(BudgetError, match="beyond 255" if levels == 256 else "levels"):
        make("advdm", model, eps_levels=levels)


def test_a_radius_that_is_no_number_is_refused_as_every_such_setting(model):
    with pytest.raises(ValueError, match="finite number"):
        make("advdm", model, eps_levels=float("nan"))


def test_impossible_settings_are_refused(model):
    for settings, words in (
        ({"t_range": (500, 2000)}, "within the 1000"),
        ({"t_policy": "list"}, "go together"),
        ({"jpeg_qualities": (0,)}, "1..100"),
        ({"blur_sigma": (1.0, 0.5)}, "both positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            make("advdm", model, **settings)
    with pytest.raises(ConfigError, match="no target"):
        make("advdm", model, target=picture(0))
    with pytest.raises(ConfigError, match="multiple of 16"):
        make("advdm", model, tile=24, overlap=4).perturb(pictures(1))


def test_other_pictures_and_masks_are_refused(model):
    poison, images = make("vae", model), pictures(2)
    with pytest.raises(ShapeError, match="uint8"):
        poison.perturb({"a": images["k0"].float()})
    with pytest.raises(DataError, match="no mask"):
        poison.perturb(images, masks={"k0": torch.ones(1, 32, 32)})
    with pytest.raises(ShapeError, match="in \\[0, 1\\]"):
        poison.perturb({"k0": images["k0"]}, masks={"k0": torch.full((1, 32, 32), 255.0)})
    with pytest.raises(DataError, match="empty"):
        poison.perturb({"k0": images["k0"]}, masks={"k0": torch.zeros(1, 32, 32)})

"""Each poison moves what it says it moves, and its gradient is the gradient of that."""

import copy

import pytest
import torch
from poisons.diffusion.photos import POISONS, make, picture, pictures, settle
from tiny import tiny_model

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.gradients import gradient_of, pixel_gradient
from poisonshield.random import KeyedRandom


def first_view(poison, images, *, step=0):
    canvas = Canvas(poison, images, None)
    canvas.start()
    return canvas.view(0, KeyedRandom(poison.seed, canvas.ids, step, "draw 0"), canvas.padded())


@pytest.mark.parametrize("sign", ["+", "-"])
def test_advdm_moves_the_loss_its_way_under_common_random_numbers(fitted, sign):
    images = pictures()
    judge = make("advdm", fitted)
    out = make("advdm", fitted, direction=sign, steps=10).perturb(images)
    before, after = judge.measure(images), judge.measure(out)
    assert judge.measure(images) == before
    moved = torch.tensor([after[k] - before[k] for k in images]) * (1 if sign == "+" else -1)
    print(f"advdm{sign}: {[round(v, 4) for v in moved.tolist()]} of {[round(v, 4) for v in before.values()]}")
    assert (moved > 0).sum() >= 2 and moved.mean() > 0


@pytest.mark.parametrize("name", POISONS.names())
def test_every_objective_rises(fitted, name):
    """Mean of 32 fixed draws, source against result; with a surrogate, on the one that it ended with."""
    images = pictures()
    poison = make(name, fitted, steps=10)
    out = poison.perturb(images)
    start, end = poison.measure(images), poison.measure(out, clean=images)
    moved = torch.tensor([end[k] - start[k] for k in images])
    print(f"{name}: {[round(v, 5) for v in moved.tolist()]}")
    assert moved.mean() > 0 and (moved > 0).sum() >= 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sds_is_the_error_through_the_vae_alone(prediction):
    model = tiny_model(prediction=prediction)
    poison = make("sds", model, direction="+")
    view = first_view(poison, pictures(2))
    calls = []
    handle = model.unet.register_full_backward_hook(lambda *a: calls.append(1))
    try:
        found = poison.gradient(view)
    finally:
        handle.remove()
    x = view.x.clone().requires_grad_()
    t, noise = poison.timesteps(view), poison.noise(view, "noise")
    z = model.encode(x, noise=poison.noise(view, "posterior"))
    a = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    z_t = a.sqrt() * z.detach() + (1 - a).sqrt() * noise
    with torch.no_grad():
        says = model.unet(z_t, t, encoder_hidden_states=model.prompts(["a photo"]).expand(2, -1, -1)).sample
    if prediction == "v_prediction":
        says = a.sqrt() * says + (1 - a).sqrt() * z_t
    ((says - noise).detach() * z).sum().backward()
    assert (found - x.grad).abs().max() / x.grad.abs().max() < 1e-5
    assert not calls and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_split_backward_is_exact(prediction, recompute):
    model = tiny_model(prediction=prediction).double()
    poison = make("advdm", model, recompute=recompute)
    view = first_view(poison, pictures(2))
    x = view.x.double()
    t, noise, posterior = poison.timesteps(view), poison.noise(view, "noise"), poison.noise(view, "posterior")
    whole = x.clone().requires_grad_()
    z = model.encode(whole, noise=posterior)
    a = model.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    says = model.unet(z_t, t, encoder_hidden_states=poison.context.expand(2, -1, -1)).sample
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    (says - target).square().flatten(1).mean(1).sum().backward()
    split = pixel_gradient(
        model,
        x,
        lambda z: gradient_of(lambda v: poison.diffusion_loss(v, view), z),
        posterior=posterior,
        change=lambda v: v,
        recompute=recompute,
    )
    assert z.dtype == torch.float64
    assert (split - whole.grad).abs().max() / whole.grad.abs().max() < 1e-8


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mist", {"mode": "tex"}), ("photoguard_enc", {"toward": "pattern"}), ("photoguard_enc", {"eps_levels": 15.3})],
)
def test_the_distance_to_the_target_falls(model, name, settings):
    images = pictures(1)
    poison = make(name, model, steps=20, random_start=False, **settings)
    canvas = Canvas(poison, images, None)
    distances = [-poison.measure(images)["k0"]]
    for _ in range(20):
        canvas.advance(20)
        distances.append(-poison.measure(canvas.released(), clean=images)["k0"])
    falls = sum(b < a for a, b in zip(distances, distances[1:], strict=False))
    # Mist's objective is the square of a distance.
    share = (distances[-1] / distances[0]) ** (0.5 if name == "mist" else 1)
    print(f"{name} {settings}: {share:.3f} of the distance left, {falls} of 20 steps fell")
    assert share <= 0.8 and falls >= 15


@pytest.mark.parametrize(
    ("steps", "step_levels", "random_start"), [(20, 1.0, False), (20, 1.0, True), (40, 0.5, False)]
)
def test_photoguard_to_zero_goes_as_far_as_the_budget_lets_it(model, steps, step_levels, random_start):
    """A fall of a fifth in 20 steps is out of reach at 8 levels: an encoder that were linear there would allow 19.5 %.

    That bound is the radius times the sum of the gradient's sizes; what is reached depends on neither step nor start.
    """
    images = pictures(1)
    poison = make("photoguard_enc", model, steps=steps, step_levels=step_levels, random_start=random_start)
    x = (images["k0"][None].float() / 255).requires_grad_()
    distance = model.posterior(x)[0].norm()
    bound = 8 / 255 * float(torch.autograd.grad(distance, x)[0].abs().sum() / distance.detach())
    start, end = (-poison.measure(p, clean=images)["k0"] for p in (images, poison.perturb(images)))
    print(
        f"{steps} steps of {step_levels}: {1 - end / start:.3f} of the distance gone, "
        f"a linear encoder allows {bound:.3f}"
    )
    assert 0.75 * bound <= 1 - end / start <= bound < 0.2


def test_a_given_target_is_covered_not_squeezed(model):
    from poisonshield.poisons.diffusion.attack.target import cover, pattern

    wide = torch.zeros(3, 20, 60, dtype=torch.uint8)
    wide[:, :, 20:40] = 255  # a white square in the middle
    assert cover(wide, (40, 40)).min() > 0.5
    ours = pattern((20, 27), 0, torch.device("cpu"))
    assert set(ours.unique().tolist()) == {0.0, 1.0} and torch.equal(ours[:, :8, :8], ours[:, 8:16, 16:24])
    assert ours[:, :8, :8].mean() == 0.5
    poison = make("photoguard_enc", model, toward="given", target=picture(5, (16, 40)), steps=2)
    assert poison.perturb(pictures(1))["k0"].shape == (3, 32, 32)
    with pytest.raises(ConfigError, match="go together"):
        make("photoguard_enc", model, toward="given")


def test_a_target_that_would_not_be_used_is_refused(model):
    target = picture(5)
    for name, settings in (("advdm", {}), ("mist", {"mode": "sem"})):
        with pytest.raises(ConfigError, match="as it is set has no target"):
            make(name, model, target=target, **settings)
    assert all(make("mist", model, target=target, mode=mode).target is target for mode in ("tex", "joint"))


def balance(model, side):
    """Sizes of mist's two latent gradients, at one timestep."""
    poison = make("mist", model, mode="joint", random_start=False, t_policy="list", t_list=(300,))
    view = first_view(poison, {"a": picture(0, (side, side))})
    z = poison.latents(view)
    texture, semantic = (gradient_of(lambda v, i=i: poison.terms(v, view)[i], z).norm() for i in (0, 1))
    return float(texture / semantic), z[0].numel()


def test_mist_joint_has_one_balance_at_all_sizes(fitted):
    """The published sum over latents against a mean fails this by a factor of 4."""
    (small, cells), (large, more) = balance(fitted, 32), balance(fitted, 64)
    print(
        f"texture / semantics at 32 px {small:.2f}, 64 px {large:.2f}; as a sum {small * cells:.0f}, {large * more:.0f}"
    )
    assert max(small, large) / min(small, large) < 1.5
    assert large * more / (small * cells) > 1.5


def test_pid_moves_both_moments_and_reads_the_clean_ones_once(model, monkeypatch):
    images, calls = pictures(1), []
    poison = make("pid", model, steps=5)
    canvas = Canvas(poison, images, None)
    canvas.start()
    random = KeyedRandom(0, canvas.ids)
    start = [
        float(v)
        for v in poison.terms(canvas.view(0, random, canvas.padded()).x, canvas.view(0, random, canvas.padded()))
    ]
    for _ in range(5):
        canvas.advance(5)
    end = [
        float(v)
        for v in poison.terms(canvas.view(0, random, canvas.padded()).x, canvas.view(0, random, canvas.padded()))
    ]
    print(f"pid (log var, mean): {start} -> {end}")
    assert end[0] > start[0] and end[1] > start[1]
    real = model.posterior
    monkeypatch.setattr(model, "posterior", lambda x: (calls.append(1), real(x))[1])
    poison.perturb(images)
    assert len(calls) == 1 + 5  # once for the clean moments, and once a step


@pytest.mark.parametrize("name", ["vae", "pid"])
def test_where_the_source_has_no_gradient_the_start_is_noise(model, name):
    poison = make(name, model)
    canvas = Canvas(poison, pictures(1), None)
    assert canvas.gradient().abs().max() == 0
    canvas.start()
    assert 7 < canvas.delta.abs().max() <= 8 and canvas.gradient().abs().max() > 0
    with pytest.raises(ConfigError, match="start from noise"):
        make(name, model, random_start=False)


def test_published_starts_are_kept(model):
    for name, moved in (
        ("sds", False),
        ("sdst", False),
        ("fsmg", False),
        ("aspl", False),
        ("advdm", True),
        ("mist", True),
    ):
        canvas = Canvas(make(name, model), pictures(1), None)
        canvas.start()
        assert bool(canvas.delta.any()) == moved, name


def test_draws_and_changes_are_averaged_over(model):
    images = pictures(1)
    poison = make("advdm", model, draws=3, eot=("jpeg", "blur", "flip"))
    canvas = Canvas(poison, images, None)
    parts = []
    for draw in range(3):
        random = KeyedRandom(0, canvas.ids, 0, f"draw {draw}")
        parts.append(poison.gradient(canvas.view(0, random, canvas.padded())))
    assert torch.allclose(canvas.gradient(), sum(parts), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(parts[0], parts[1])


def test_a_masked_loss_pulls_on_what_the_mask_shows_only(model):
    """With a random U-Net the loss outside leaks in only through the networks, so the gradient is mostly inside."""
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :8] = 1
    poison = make("advdm", model, mask="loss", random_start=False)
    canvas = Canvas(poison, pictures(1), {"k0": mask})
    assert canvas.pixel_mask is None and canvas.cell_mask.shape == (1, 1, 16, 16)
    view = canvas.view(0, KeyedRandom(0, canvas.ids), canvas.padded())
    z = poison.latents(view).detach()
    t, noise = poison.timesteps(view), poison.noise(view, "noise")
    pred = poison.denoise(model.noised(z, t, noise), t)
    cells = canvas.cell_mask[0, 0].double()
    slow = sum(
        float(cells[i, j]) * float((pred - noise)[0, c, i, j]) ** 2
        for c in range(4)
        for i in range(16)
        for j in range(16)
    ) / (4 * float(cells.sum()))
    assert abs(float(poison.diffusion_loss(z, view)) - slow) < 1e-5


def test_a_velocity_model_gives_the_loss_of_its_velocity():
    model = settle(copy.deepcopy(tiny_model(prediction="v_prediction")))
    images = pictures(2)
    poison = make("advdm", model, steps=6)
    assert (
        torch.tensor([*poison.measure(poison.perturb(images)).values()]).mean()
        > torch.tensor([*poison.measure(images).values()]).mean()
    )

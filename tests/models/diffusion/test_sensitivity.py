"""Sensitivity maps against reverse mode, finite differences and arithmetic by hand; what they leave unchanged."""

import functools
import logging

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from poisonshield.errors import ConfigError, ShapeError
from poisonshield.models.diffusion.sensitivity import Sensitivity, semantic_sensitivity

PROMPT = "a photo of a <sks>"


@functools.cache
def prepared(prediction="epsilon", double=False):
    """A pipeline at 16 pixels, 8 x 8 cells. <sks> has two rows; before them one of a word that the prompt lacks."""
    model = tiny_model(prediction=prediction, size=16)
    if double:
        model = model.double()
    model.add_placeholder("<other>")
    model.add_placeholder("<sks>", 2)
    words = [model.word_vector(w) for w in ("star", "ring", "red")]
    return model, torch.stack(words).to(model.dtype)


def picture(seed=0, count=1, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def noise_of(model, like, *, key="0", draw=0, seed=0):
    from poisonshield.random import KeyedRandom, sample_ids

    drawn = KeyedRandom(seed, sample_ids([key]), draw, "sensitivity").normal("noise", like.numel())
    return drawn.view_as(like).to(like.dtype)


def by_hand(model, x, t, noise):
    """(prediction as a function of the context, and of the rows; target) from square roots and the networks alone."""
    z = model.encode(x).detach()
    a = model.alphas_cumprod[t].to(z.dtype)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    target = noise if model.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    ids = model.tokens([PROMPT])

    def of_context(context):
        return model.predict(z_t, torch.tensor([t]), context)

    return of_context, lambda rows: of_context(model.text(ids, rows)), target


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_exact_maps_are_the_norms_of_the_reverse_mode_jacobian(prediction):
    model, rows = prepared(prediction)
    x, t, noises = picture(), 300, 2
    u = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    wanted = {"loss_grad": 0, "pred_jac": 0, "signed": 0}
    for draw in range(noises):
        _, predict, target = by_hand(model, x, t, noise_of(model, model.encode(x), draw=draw))
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(predict, rows)[0]  # [C, h, w, R, d]
        e = (predict(rows) - target)[0].detach()
        by_position = 2 * torch.einsum("chw,chwrd->hwrd", e, jacobian)
        wanted["loss_grad"] += by_position.flatten(2).norm(dim=2) / noises
        wanted["pred_jac"] += jacobian.square().sum((0, 3, 4)).sqrt() / noises
        wanted["signed"] += torch.einsum("hwrd,rd->hw", by_position, u) / noises
    for mode, map_ in wanted.items():
        more = {"direction": u} if mode == "signed" else {}
        got = semantic_sensitivity(
            model, x, rows=rows, prompt=PROMPT, timesteps=[t], mode=mode, exact=True, noises=noises, **more
        )
        error = relative(got.maps[0, 0], map_)
        print(f"{prediction} {mode}: {error:.1e} of the largest value")
        assert error < 1e-5


def test_exact_maps_of_the_context_are_those_of_reverse_mode_too():
    model, rows = prepared()
    x, t = picture(1), 500
    of_context, predict, target = by_hand(model, x, t, noise_of(model, model.encode(x)))
    context = model.prompts([PROMPT], rows).detach()
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(of_context, context)[0]
    e = (predict(rows) - target)[0].detach()
    wanted = 2 * torch.einsum("chw,chwbld->hwbld", e, jacobian).flatten(2).norm(dim=2)
    got = semantic_sensitivity(
        model, x, rows=rows, prompt=PROMPT, timesteps=[t], wrt="context", exact=True, noises=1, chunk=128
    )
    assert relative(got.maps[0, 0], wanted) < 1e-5


@pytest.mark.parametrize("mode", ["loss_grad", "pred_jac"])
def test_random_probes_find_the_exact_map(mode):
    model, rows = prepared()
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [100, 700], "mode": mode, "noises": 1}
    exact = semantic_sensitivity(model, picture(), exact=True, **settings).maps
    for probes, least in ((64, 0.95), (128, 0.97)):
        probed = semantic_sensitivity(model, picture(), probes=probes, **settings).maps
        found = [
            float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
            for a, b in zip(probed[0], exact[0], strict=True)
        ]
        print(f"{mode} K={probes}: correlation {min(found):.4f}, mean ratio {float(probed.mean() / exact.mean()):.3f}")
        assert min(found) > least
        assert abs(float(probed.mean() / exact.mean()) - 1) < 0.1


def test_chunks_change_nothing_and_keys_decide_the_noise():
    model, rows = prepared()
    x = picture(0).expand(2, -1, -1, -1)
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [400], "noises": 1, "probes": 8}
    maps = semantic_sensitivity(model, x, keys=["a", "b"], chunk=8, **settings).maps
    assert relative(semantic_sensitivity(model, x, keys=["a", "b"], chunk=3, **settings).maps, maps) < 1e-5
    assert relative(maps[0], maps[1]) > 0.05
    assert torch.equal(semantic_sensitivity(model, x, keys=["a", "a"], chunk=8, **settings).maps[1], maps[0])


def test_delta_is_the_distance_of_two_predictions_and_nothing_between_equal_embeddings():
    model, rows = prepared()
    other = rows.flip(0)
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [200], "mode": "delta", "noises": 1}
    assert semantic_sensitivity(model, picture(), rows_b=rows.clone(), **settings).maps.abs().max() == 0
    _, predict, _ = by_hand(model, picture(), 200, noise_of(model, model.encode(picture())))
    # The row of <other> is not in the prompt, so its value does not matter.
    wanted = (predict(rows) - predict(other)).detach()[0].norm(dim=0)
    for wrt in ("token", "context"):
        got = semantic_sensitivity(model, picture(), rows_b=other, wrt=wrt, **settings).maps[0, 0]
        assert relative(got, wanted) < 1e-5


class _Blind(nn.Module):
    """A U-Net that never looks at the text."""

    dtype = torch.float32

    def __init__(self, inner):
        super().__init__()
        self.net, self.config = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), inner.config

    def forward(self, z, t, encoder_hidden_states):
        return type("Out", (), {"sample": self.net(z)})


def fresh():
    model = tiny_model(size=16)
    model.add_placeholder("<sks>")
    return model, model.word_vector("ring")[None]


def test_a_network_that_ignores_the_text_has_empty_maps():
    model, rows = fresh()
    model.unet = _Blind(model.unet)
    plain = {"loss_grad": {}, "pred_jac": {}, "input_sal": {}}
    for mode, more in (plain | {"delta": {"rows_b": rows + 1}, "signed": {"direction": rows}}).items():
        got = semantic_sensitivity(
            model, picture(), rows=rows, prompt=PROMPT, timesteps=[500], mode=mode, probes=4, noises=1, **more
        )
        assert got.maps.shape == (1, 1, 8, 8) and got.maps.abs().max() == 0, mode


def enabled():
    b = torch.backends.cuda
    return b.flash_sdp_enabled(), b.mem_efficient_sdp_enabled(), b.math_sdp_enabled(), b.cudnn_sdp_enabled()


@pytest.mark.parametrize("backend", [None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_any_attention_backend_will_do_and_is_set_again(backend):
    model, rows = prepared()
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [400], "noises": 1, "probes": 4}
    plain = semantic_sensitivity(model, picture(), **settings).maps
    before = enabled()
    if backend is None:
        with pytest.raises(ShapeError):
            semantic_sensitivity(model, picture(side=15), **settings)
        assert enabled() == before
        return
    with sdpa_kernel(backend):
        inside = enabled()
        assert inside != before
        for mode in ("loss_grad", "input_sal"):
            got = semantic_sensitivity(model, picture(), mode=mode, **settings).maps
            assert got.max() > 0
            assert mode != "loss_grad" or torch.equal(got, plain)
        assert enabled() == inside
    assert enabled() == before


@pytest.mark.parametrize("inputs", ["latents", "pixels"])
def test_input_saliency_agrees_with_finite_differences_in_float64(inputs):
    model, rows = prepared(double=True)
    x, t = picture(2).double(), 250
    z = model.encode(x).detach()
    noise, ids = noise_of(model, z), model.tokens([PROMPT])
    a = model.alphas_cumprod[t]

    def gradient_norm(source):
        z = source if inputs == "latents" else model.encode(source).detach()
        v = rows.clone().requires_grad_()
        pred = model.predict(a.sqrt() * z + (1 - a).sqrt() * noise, torch.tensor([t]), model.text(ids, v))
        loss = (pred - noise).square().sum(1).mean()
        return float(torch.autograd.grad(loss, v)[0].norm())

    got = semantic_sensitivity(
        model, x, rows=rows, prompt=PROMPT, timesteps=[t], mode="input_sal", noises=1, inputs=inputs
    ).maps[0, 0]
    source, h = (z, 1e-5) if inputs == "latents" else (x, 1e-5)
    assert got.shape == source.shape[2:]
    for p, q in ((0, 0), (3, 5), (7, 2)):
        total = 0.0
        for c in range(source.shape[1]):
            step = torch.zeros_like(source)
            step[0, c, p, q] = h
            total += ((gradient_norm(source + step) - gradient_norm(source - step)) / (2 * h)) ** 2
        print(f"{inputs} ({p}, {q}): {float(got[p, q]):.6e}, by differences {total**0.5:.6e}")
        assert abs(float(got[p, q]) / total**0.5 - 1) < 1e-5


def test_central_differences_come_near_the_forward_derivative():
    model, rows = prepared()
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [300], "noises": 1, "probes": 8}
    for mode, more in (("loss_grad", {}), ("pred_jac", {}), ("signed", {"direction": rows})):
        forward, differences = (
            semantic_sensitivity(model, picture(), mode=mode, derivative=d, **settings, **more).maps
            for d in ("forward", "differences")
        )
        print(f"{mode}: {relative(differences, forward):.2e}")
        assert relative(differences, forward) < 0.02


class _NoRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_network_without_forward_rule_is_differenced_and_says_so_once(caplog):
    model, rows = fresh()
    settings = {"rows": rows, "prompt": PROMPT, "timesteps": [300, 600], "noises": 1, "probes": 4}
    forward = semantic_sensitivity(model, picture(), **settings).maps
    model.unet.conv_out.register_forward_hook(lambda module, args, out: _NoRule.apply(out))
    with caplog.at_level(logging.WARNING):
        got = semantic_sensitivity(model, picture(), **settings).maps
    assert relative(got, forward) < 0.02
    assert len([r for r in caplog.records if "Central differences" in r.message]) == 1
    with pytest.raises(RuntimeError):
        semantic_sensitivity(model, picture(), derivative="forward", **settings)


def test_concept_share_is_one_without_preference_and_one_over_the_area_inside():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :2] = 1

    def share(maps):
        return Sensitivity(maps, (0,), "loss_grad", mask).concept_share

    assert float(share(torch.full((1, 1, 4, 4), 3.0))) == pytest.approx(1)
    assert float(share(mask * 7)) == pytest.approx(4)
    assert float(share(1 - mask)) == 0
    assert float(share(-mask)) == pytest.approx(4)  # signed maps count by their size
    assert Sensitivity(mask, (0,), "loss_grad").concept_share is None
    assert Sensitivity(mask * 2, (0,), "loss_grad").total.tolist() == [[8.0]]


def test_masks_come_at_pixel_size_and_leave_at_that_of_the_maps():
    model, rows = prepared()
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :, :3] = 1
    got = semantic_sensitivity(
        model, picture(0, 2), rows=rows, prompt=PROMPT, timesteps=[9, 900], probes=2, noises=1, mask=mask
    )
    assert got.maps.shape == (2, 2, 8, 8) and got.maps.dtype == torch.float32
    assert got.total.shape == got.concept_share.shape == (2, 2)
    assert got.mask[0, 0, 0].tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0]


def test_what_does_not_fit_is_refused_in_words():
    model, rows = prepared()

    def ask(**changes):
        return semantic_sensitivity(model, picture(), **({"rows": rows, "prompt": PROMPT, "timesteps": [1]} | changes))

    for changes, words in (
        ({"prompt": "a photo of a ring"}, "holds no placeholder. Known: <other>, <sks>"),
        ({"mode": "grad"}, "mode 'grad' is unknown"),
        ({"mode": "delta"}, "needs rows_b"),
        ({"mode": "signed"}, "needs direction"),
        ({"direction": rows}, "is for mode 'signed'"),
        ({"timesteps": [1000]}, "0 to 999"),
        ({"timesteps": []}, "0 to 999"),
        ({"noises": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            ask(**changes)
    for changes, words in (
        ({"rows": rows[:1]}, r"\[3, 16\]"),
        ({"mask": torch.ones(1, 1, 8, 8)}, r"\[1, 1, 16, 16\] is wanted"),
        ({"keys": ["a", "b"]}, "2 keys came for 1"),
        ({"mode": "signed", "direction": rows[0]}, r"it is \(3, 16\)"),
        ({"mode": "signed", "direction": rows, "wrt": "context"}, r"it is \(24, 16\)"),
    ):
        with pytest.raises(ShapeError, match=words):
            ask(**changes)
    half = tiny_model(size=16).half()
    half.add_placeholder("<sks>")
    with pytest.raises(ConfigError, match="float32 at loading"):
        semantic_sensitivity(half, picture(), rows=torch.zeros(1, 16), prompt=PROMPT, timesteps=[1])

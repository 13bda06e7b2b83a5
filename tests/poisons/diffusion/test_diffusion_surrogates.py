"""Poisons that train a surrogate: what moves, what does not, and that the loop does what its paper says."""

import copy

import pytest
import torch
from poisons.diffusion.photos import make, picture, pictures
from tiny import tiny_model

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.attack.surrogate import TOKEN

REFERENCE = {f"r{i}": picture(20 + i) for i in range(2)}


def trained(poison, images, steps, **settings):
    """The surrogate after `steps` on clean pictures, and what it was."""
    before = poison.surrogate.state()
    poison.surrogate.train(poison.canvases(images, None), steps, first=0, phase="clean", clean=True, **settings)
    return before, poison.surrogate.state()


def test_nearly_every_tensor_moves_at_the_published_rate_and_clipping_sees_them(model, monkeypatch):
    poison, seen = make("aspl", model, lr=5e-7), []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: (seen.append((len([*p]), n)), real(p, n))[1])
    before, after = trained(poison, pictures(1), 3)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    print(f"{sum(moved)} of {len(moved)} tensors moved")
    assert sum(moved) / len(moved) >= 0.99
    assert seen == [(len(before), 1.0)] * 3 and len(before) > 50


def test_clipped_gradients_have_the_norm_asked_for(model, monkeypatch):
    poison, norms = make("aspl", model, clip_norm=1e-3), []
    step = torch.optim.AdamW.step

    def spied(self, *a, **k):
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.cat(grads).norm()))
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    trained(poison, pictures(1), 1)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_masters_are_float32_where_the_model_is_bfloat16():
    model = tiny_model().to(torch.bfloat16)
    model.alphas_cumprod = model.alphas_cumprod.float()
    poison, images = make("aspl", model, lr=5e-7, steps=1), pictures(1, (16, 16))
    before, after = trained(poison, images, 1)
    assert all(p.dtype == torch.float32 for p in before)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) / len(before)
    lost = sum(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(before, after, strict=True)) / len(before)
    print(f"tensors that moved in float32: {moved:.3f}; that bfloat16 would not show moving: {lost:.3f}")
    assert moved >= 0.99
    change = poison.perturb(images)["k0"].int() - images["k0"].int()
    assert model.unet.dtype == torch.bfloat16 and 0 < change.abs().max() <= 8


@pytest.mark.parametrize(("inner", "moves"), [("full", ("unet", "text_encoder")), ("kv", ("unet",)), ("ti", ())])
def test_only_what_inner_names_is_trained(model, inner, moves):
    poison = make("aspl", model, inner=inner, lr=1e-2)
    surrogate = poison.surrogate.model
    before = copy.deepcopy({n: p.detach() for n, p in surrogate.named_parameters()})
    digest = model.digest()
    first, last = trained(poison, pictures(1), 2)
    changed = {n for n, p in surrogate.named_parameters() if not torch.equal(p, before[n])}
    assert {n.partition(".")[0] for n in changed} == set(moves)
    if inner == "kv":
        assert changed and all("attn2.to_k." in n or "attn2.to_v." in n for n in changed)
    if inner == "ti":
        assert len(first) == 1 and first[0].shape == (1, model.width) and not torch.equal(first[0], last[0])
        assert TOKEN in poison.surrogate.prompt
    assert model.digest() == digest and TOKEN not in model.tokenizer.get_vocab() and not model.placeholders
    assert surrogate.vae is model.vae and not any(p.requires_grad for p in surrogate.parameters())


def test_the_surrogates_loss_falls_in_training_and_rises_under_attack(fitted):
    images = pictures(2)
    poison = make("fsmg", fitted, lr=2e-3, steps=10, eps_levels=8)
    start = sum(poison.measure(images).values())
    poison.surrogate.train(poison.canvases(images, None), 30, first=0, phase="clean", clean=True)
    learned = sum(poison.measure(images).values())
    canvases = poison.canvases(images, None)
    for canvas in canvases:
        for _ in range(10):
            canvas.advance(10)
    attacked = sum(poison.measure({k: v for c in canvases for k, v in c.released().items()}).values())
    print(f"surrogate's loss: {start:.4f}, trained {learned:.4f}, attacked {attacked:.4f}")
    assert learned < start and attacked > learned


def test_aspl_alternates_as_published(model):
    poison = make("aspl", model, steps=6, pgd_steps=2, inner_steps=3, lr=1e-3)
    events, images = [], pictures(1)
    from poisonshield.poisons.diffusion.attack import canvas, surrogate

    train, restore, advance = surrogate.Surrogate.train, surrogate.Surrogate.restore, canvas.Canvas.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            surrogate.Surrogate, "train", lambda s, c, n, **k: (events.append((k["phase"], n)), train(s, c, n, **k))
        )
        patch.setattr(surrogate.Surrogate, "restore", lambda s, v: (events.append("back"), restore(s, v)))
        patch.setattr(canvas.Canvas, "advance", lambda s, n: (events.append("pixels"), advance(s, n)))
        poison.perturb(images)
    assert events == [("before", 0)] + [("clean", 3), "pixels", "pixels", "back", ("poisoned", 3)] * 3


def test_rounds_share_the_steps_and_go_on_where_they_were_left(model):
    poison = make("aspl", model, steps=8, pgd_steps=3, inner_steps=2)
    rounds = [([*turn.pixel_steps], turn.surrogate_step) for turn in poison.rounds(0)]
    assert rounds == [([0, 1, 2], 0), ([3, 4, 5], 2), ([6, 7], 4)]
    assert [*poison.rounds(3)] == [*poison.rounds(0)][1:] and not [*poison.rounds(8)]
    assert [turn.passes(4) for turn in poison.rounds(0)] == [False, True, True]


def test_a_batch_larger_than_the_set_draws_each_picture_anew(model, monkeypatch):
    poison, seen = make("aspl", model, batch=3), []
    real = type(poison).noise
    monkeypatch.setattr(
        type(poison),
        "noise",
        lambda s, v, purpose: (n := real(s, v, purpose), purpose == "noise" and seen.append(n))[0],
    )
    trained(poison, pictures(1), 2)
    assert len(seen) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_training_that_was_broken_off_is_begun_anew(model, monkeypatch):
    images = pictures(1)
    poison, whole = (make("fsmg", model, steps=1, surrogate_steps=2, lr=1e-2) for _ in range(2))
    learned = poison.perturb(images)["k0"]
    step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            poison.perturb({"other": picture(7)})
    assert torch.optim.AdamW.step is step
    assert torch.equal(poison.perturb(images)["k0"], learned) and torch.equal(whole.perturb(images)["k0"], learned)


def test_a_reference_set_is_what_the_surrogate_learns(model):
    cls, images = type(make("fsmg", model)), pictures(2)
    config = cls.Config(steps=2, surrogate_steps=2, lr=1e-2)
    alone = cls(config, model=model)
    given = cls(config, model=model, reference=REFERENCE)
    assert alone.coupled and not given.coupled
    together, one = given.perturb(images), cls(config, model=model, reference=REFERENCE).perturb({"k1": images["k1"]})
    assert torch.equal(together["k1"], one["k1"])
    assert not torch.equal(alone.perturb(images)["k1"], together["k1"])


def test_class_images_count_where_they_have_weight(model):
    cls = type(make("fsmg", model))
    states = []
    for weight in (0.0, 1.0):
        others = REFERENCE if weight else None
        poison = cls(cls.Config(prior_weight=weight, lr=1e-2), model=model, class_images=others)
        poison.surrogate.train(
            poison.canvases(pictures(1), None),
            1,
            first=0,
            phase="clean",
            clean=True,
            prior=poison.canvases(REFERENCE, None),
        )
        states.append(poison.surrogate.state())
    assert any(not torch.equal(a, b) for a, b in zip(*states, strict=True))
    with pytest.raises(ConfigError, match="class_images"):
        make("fsmg", model, prior_weight=1.0)
    with pytest.raises(ConfigError, match="would teach nothing"):
        cls(cls.Config(), model=model, class_images=REFERENCE)


def test_a_defended_surrogate_sees_what_the_defense_leaves(model):
    settings = {"inner": "ti", "lr": 1e-2, "eot": ("jpeg",), "jpeg_qualities": (10,), "t_range": (900, 1000)}
    naive, defended = (make("aspl", model, defended=d, **settings) for d in (False, True))
    rows = [trained(p, pictures(1), 2)[1][0] for p in (naive, defended)]
    assert not torch.equal(*rows)


def test_a_word_trained_under_the_defense_is_attacked_under_it(fitted):
    from poisonshield.poisons.diffusion.attack.presets import resolve

    cls, config = resolve("adaptive-szt-ti", None, {"steps": 6, "pgd_steps": 3, "eps_levels": 8, "step_levels": 2})
    assert config.lr is None and config.inner == "ti" and config.defended
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    images, masks = pictures(2), {k: mask for k in ("k0", "k1")}
    poison = cls(config, model=fitted)
    row = poison.surrogate.rows.clone()
    out = poison.perturb(images, masks=masks)
    assert not torch.equal(poison.surrogate.rows, row)
    start, end = (sum(poison.measure(x, masks=masks).values()) for x in (images, out))
    print(f"masked loss after JPEG, t >= 500, with the learned word: {start / 2:.5f} -> {end / 2:.5f}")
    assert end > start


def test_a_learned_word_needs_its_place_in_the_prompt(model):
    with pytest.raises(ConfigError, match="no {}"):
        make("aspl", model, inner="ti", prompt="a photo").perturb(pictures(1))
    row = make("aspl", model, inner="ti", init_word="ring").surrogate.rows[0]
    assert torch.equal(row, model.word_vector("ring"))

"""Safe-Zone Training: what `before` and `wrap` do, and all that they refuse."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from poisonshield import world
from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.diffusion.szt import MASKS, SZT
from poisonshield.errors import ConfigError, DataError
from poisonshield.losses.zone import Zone
from poisonshield.ops import jpeg
from poisonshield.registry import Registry

OFF = {"purifier": None, "t_min": 0, "t_max": None, "mask": None}


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    made.add_placeholder("<a>")
    made.add_placeholder("<b>", 2)
    return made


def method_of(model):
    return SimpleNamespace(name="textual_inversion", model=model, trains_words=True)


def build(model=None, seed=0, **settings):
    defense = SZT(SZT.Config(**settings), Context(seed, model=model, words=("circle", "circle")))
    if model is not None:
        defense.wrap(method_of(model))
    return defense


def photos(count=3, draw=0, masks=True):
    """Rendered pictures with exact masks, on 8-bit levels."""
    shown = [world.render(i, seed=4) for i in range(count)]
    x = torch.stack([(p.x * 255).round() / 255 for p in shown])
    mask = torch.stack([p.mask for p in shown]) if masks else None
    keys = tuple(f"one/{'abcdef'[i]}@12#{i}" for i in range(count))
    return Batch(keys, x, mask=mask, y=torch.zeros(count, dtype=torch.int64), draw=draw)


def test_it_is_found_by_name_and_masks_are_too():
    assert Registry("poisonshield.defenses.diffusion", kind="defense").get("szt") is SZT and not SZT.purifier
    assert set(MASKS.names()) >= {"attention", "box", "grabcut", "ssm"}


def test_off_leaves_everything_as_it_was_on_all_timesteps(model):
    batch = photos(masks=False)
    out = build(model, **OFF).before(batch)
    assert out.x is batch.x and out.mask is None and out.keys == batch.keys and out.t_range == (0, 1000)


def test_default_is_jpeg_25_high_timesteps_and_the_given_mask(model):
    batch, defense = photos(), build(model)
    out = defense.before(batch)
    assert torch.equal(out.x, jpeg(batch.x, 25, subsampling="420", mode="exact"))
    assert out.mask is batch.mask and out.t_range == (500, 1000) and out.keys == batch.keys and defense.label == "szt"
    assert defense.config.purifier == {"name": "jpeg", "quality": 25, "subsampling": "420"}
    assert defense.areas == {
        k.partition("#")[0]: pytest.approx(m.mean().item()) for k, m in zip(batch.keys, batch.mask, strict=True)
    }


def test_wrap_tells_the_method_and_returns_it(model):
    defense = build(model, loss_norm="batch", mask_resize="max", mask_floor=0.1, mask_dilate=2, t_sampler="soft")
    method = method_of(model)
    assert defense.wrap(method) is method and defense.model is model
    assert method.zone == Zone("batch", "max", 0.1, 2) and method.t_sampler == "soft"


def test_other_methods_are_refused():
    with pytest.raises(ConfigError, match="simclr is none"):
        build().wrap(SimpleNamespace(name="simclr", trains_words=False))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"t_min": 0.5}, (500, 1000)),
        ({"t_min": "1/4", "t_max": 900}, (250, 900)),
        ({"t_min": 0, "t_max": 250}, (0, 250)),
        ({"t_min": 999}, (999, 1000)),
    ],
)
def test_timesteps_are_numbers_or_fractions_of_all(model, settings, wanted):
    assert build(model, **settings).before(photos()).t_range == wanted


@pytest.mark.parametrize("settings", [{"t_min": 1000}, {"t_max": 1001}, {"t_min": 0.9, "t_max": 900}])
def test_timesteps_that_the_pipeline_lacks_are_refused(model, settings):
    with pytest.raises(ConfigError, match="0 to 999"):
        build(model, **settings)


@pytest.mark.parametrize("t_min", [-1, 1.5, 0.0, 1.0, True, "high", "3/0", None])
def test_t_min_that_is_no_timestep_is_refused(t_min):
    with pytest.raises(ValueError, match="or auto is wanted"):
        SZT.Config(t_min=t_min)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"t_min": 500, "t_max": 500}, "no timestep"),
        ({"mask": None, "background": "mean"}, "needs a mask"),
        ({"t_min": "auto", "t_reference": {"name": "jpeg", "quality": 25}}, "another one"),
        ({"purifier": "vespr"}, "not a purifier"),
        ({"purifier": "szt"}, "not a purifier"),
        ({"purifier": "medain"}, "Did you mean median"),
        ({"purifier": {"name": "jpeg", "qualty": 3}}, "Did you mean quality"),
        ({"purifier": {"name": "bits", "bits": 9}}, "less than or equal to 7"),
        ({"purifier": {"quality": 3}}, "name:"),
        ({"mask": "sam"}, "ssm"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        SZT.Config(**settings)


def test_purifier_is_a_name_or_a_block_of_either_folder(model):
    batch = photos()
    for purifier, name in (("median", "median"), ({"name": "bits", "bits": 3}, "bits"), ("sdedit", "sdedit")):
        defense = build(model, purifier=purifier)
        assert defense.config.purifier["name"] == defense._purifier.name == name
        assert SZT.Config(**defense.config.model_dump()) == defense.config
    out = build(model, purifier={"name": "bits", "bits": 3}).before(batch)
    assert len((out.x * 255).round().unique()) <= 8 and torch.equal(out.mask, batch.mask)


def test_label_tells_what_is_left_of_it():
    label = lambda **settings: build(**settings).label
    assert label(mask="alpha") == "szt" and label(mask=None) == "szt(jpeg25, t500)"
    assert label(purifier=None, t_min=300, t_max=900) == "szt(t300-900, mask)"
    assert label(mask="grabcut", purifier="median") == "szt(median, t500, grabcut)" and label(**OFF) == "szt(off)"
    assert label(background="swap") == "szt(jpeg25, t500, mask, on swap)"


def test_settings_that_differ_are_called_differently():
    label = lambda **settings: build(**settings).label
    jpeg50 = {"name": "jpeg", "quality": 50}
    readme = label(purifier=jpeg50, mask_dilate=2, mask_floor=0.3)
    assert readme == "szt(jpeg50, t500, mask, mask_floor 0.3, mask_dilate 2)" != label(purifier=jpeg50)
    assert label(t_sampler="soft") == "szt(jpeg25, t500, mask, t_sampler soft)"
    assert label(loss_norm="batch") == "szt(jpeg25, t500, mask, loss_norm batch)"
    assert (
        label(purifier={"name": "jpeg", "quality": 25, "subsampling": "444"})
        == "szt(jpeg25 subsampling 444, t500, mask)"
    )
    assert label(t_reference="median") == "szt" and "t_reference median" in label(t_min="auto", t_reference="median")
    assert label(mask=None, mask_dilate=3) == "szt(jpeg25, t500)" and label(**OFF) == "szt(off)"


def test_before_without_wrap_is_refused():
    with pytest.raises(ConfigError, match="Context"):
        build().before(photos())


def test_masks_given_but_unused_are_an_error(model):
    with pytest.raises(ConfigError, match="one/a@12#0 .* unused"):
        build(model, mask=None).before(photos())


@pytest.mark.parametrize("mask", ["file", "alpha"])
def test_missing_masks_are_an_error_naming_the_key(model, mask):
    with pytest.raises(DataError, match="one/a@12#0 comes without a mask"):
        build(model, mask=mask).before(photos(masks=False))


def test_empty_mask_is_refused_by_its_key(model):
    batch = photos()
    batch.mask[1] = 0
    with pytest.raises(DataError, match="mask of one/b@12#1 is empty"):
        build(model).before(batch)


def test_mask_of_another_size_or_range_is_refused(model):
    batch = photos()
    with pytest.raises(DataError, match="one size"):
        build(model).before(batch.replace(mask=batch.mask[..., ::2, ::2]))
    wrong = batch.mask.clone()
    wrong[2] *= 255
    with pytest.raises(DataError, match=r"one/c@12#2 .* outside \[0, 1\]"):
        build(model).before(batch.replace(mask=wrong))


def test_tiny_and_huge_masks_are_warned_of_once(model, caplog):
    batch = photos()
    batch.mask[0] = 0.019
    batch.mask[2] = 0.91
    defense = build(model)
    with caplog.at_level(logging.WARNING):
        defense.before(batch)
        defense.before(batch)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "one/a@12 covers 1.9 %" in said[0] and "one/c@12 covers 91.0 %" in said[1]


@pytest.mark.parametrize("kind", ["mean", "noise", "swap"])
def test_background_changes_outside_the_mask_only(model, kind):
    batch = photos()
    out = build(model, purifier=None, background=kind).before(batch)
    inside, outside = (batch.mask == 1).expand_as(batch.x), (batch.mask == 0).expand_as(batch.x)
    assert torch.equal(out.x[inside], batch.x[inside]) and torch.equal(out.mask, batch.mask)
    assert not torch.equal(out.x[outside], batch.x[outside])
    assert torch.equal((out.x * 255).round() / 255, out.x) and 0 <= out.x.min() <= out.x.max() <= 1


def test_mean_background_is_one_colour_and_keeps_its_key(model):
    batch = photos()
    out = build(model, purifier=None, background="mean").before(batch)
    assert out.keys == batch.keys
    for x, before, mask in zip(out.x, batch.x, batch.mask, strict=True):
        ground = x[:, mask[0] == 0]
        assert torch.all(ground == ground[:, :1])
        wanted = (before * (1 - mask)).sum((1, 2)) / (1 - mask).sum()
        assert (ground[:, 0] - wanted).abs().max() * 255 <= 0.501


def test_noise_background_is_new_in_each_draw_and_so_are_its_keys(model):
    defense = build(model, purifier=None, background="noise")
    first, again, other = (defense.before(photos(draw=d)) for d in (0, 0, 1))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert first.keys == again.keys == ("one/a@12~noise0#0", "one/b@12~noise0#1", "one/c@12~noise0#2")
    assert not set(first.keys) & set(other.keys)
    assert not torch.equal(build(model, seed=1, purifier=None, background="noise").before(photos()).x, first.x)


def test_noise_background_has_the_backgrounds_mean_and_deviation(model):
    batch = photos(1)
    out = build(model, purifier=None, background="noise").before(batch)
    outside = batch.mask[0, 0] == 0
    before, after = batch.x[0][:, outside], out.x[0][:, outside]
    assert (before.mean(1) - after.mean(1)).abs().max() < 0.02 and (before.std(1) / after.std(1) - 1).abs().max() < 0.1


def test_swapped_background_is_another_pictures_without_its_concept(model):
    batch = photos(4)
    out = build(model, purifier=None, background="swap").before(batch)
    for i, key in enumerate(out.keys):
        picture, _, partner = key.partition("#")[0].partition("~on~")
        j = [k.partition("#")[0] for k in batch.keys].index(partner)
        assert picture == batch.keys[i].partition("#")[0] and j != i and key.endswith(f"#{i}")
        free = (batch.mask[i] == 0) & (batch.mask[j] == 0)
        assert torch.equal(out.x[i][free.expand(3, -1, -1)], batch.x[j][free.expand(3, -1, -1)])
        covered = (batch.mask[i] == 0) & (batch.mask[j] == 1)
        for channel in out.x[i]:
            assert len(channel[covered[0]].unique()) <= 1


def test_swap_does_not_depend_on_the_batchs_order_and_changes_with_the_draw(model):
    defense, batch = build(model, purifier=None, background="swap"), photos(5)
    order = [3, 0, 4, 2, 1]
    mixed = batch.replace(keys=tuple(batch.keys[i] for i in order), x=batch.x[order], mask=batch.mask[order])
    a, b = defense.before(batch), defense.before(mixed)
    assert tuple(a.keys[i] for i in order) == b.keys and torch.equal(a.x[order], b.x)
    assert len({defense.before(batch.replace(draw=d)).keys for d in range(6)}) > 1


def test_swap_with_nobody_is_refused(model):
    with pytest.raises(DataError, match="one/a@12 is alone"):
        build(model, background="swap").before(photos(1))


def test_draws_of_one_picture_are_one_picture(model):
    """The key's part before # stands for the pixels, so both must get the same background."""
    batch = photos(2)
    twice = Batch(("one/p@12#0", "one/p@12#1", "one/q@12#2"), batch.x[[0, 0, 1]], mask=batch.mask[[0, 0, 1]])
    for kind in ("noise", "swap"):
        out = build(model, purifier=None, background=kind).before(twice)
        assert torch.equal(out.x[0], out.x[1]) and out.keys[0].partition("#")[0] == out.keys[1].partition("#")[0]


def test_auto_is_refused_until_it_is_resolved(model):
    defense = build(model, t_min="auto")
    with pytest.raises(ConfigError, match="resolve"):
        defense.before(photos())
    defense.resolved = 434
    assert defense.before(photos()).t_range == (434, 1000)


def test_fixed_t_min_resolves_to_itself(model):
    assert build(model, t_min=0.3).survey(photos(), torch.zeros(3, 16), ["a photo of a <a>"] * 3) == 300


def test_auto_compares_two_purifiers_under_the_mask(model, monkeypatch):
    from poisonshield.models.diffusion import timesteps

    seen = {}

    def profile(model, x, **settings):
        seen.update(settings, x=x)
        return "profile"

    monkeypatch.setattr(timesteps, "timestep_profile", profile)
    monkeypatch.setattr(timesteps, "choose_t_min", lambda p: {"profile": 320}[p])
    batch, defense = photos(), build(model, t_min="auto")
    assert defense.survey(batch, torch.zeros(3, 16), ("a <a>", "b <a>", "c <a>")) == 320 == defense.resolved
    assert torch.equal(seen["x"], jpeg(batch.x, 25, mode="exact")) and torch.equal(seen["mask"], batch.mask)
    assert torch.equal(seen["ref"], jpeg(batch.x, 10, mode="exact")) and seen["prompts"] == ["a <a>", "b <a>", "c <a>"]
    assert defense.before(batch).t_range == (320, 1000)


def test_auto_on_a_tiny_pipeline_gives_a_timestep(model):
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    small = photos(1).replace(x=photos(1).x[..., 16:48, 16:48], mask=photos(1).mask[..., 16:48, 16:48])
    assert 200 <= build(model, t_min="auto").survey(small, rows, ["a photo of a <a>"]) <= 800
    bounded = build(model, t_min="auto", t_max=300)
    assert 60 <= bounded.survey(small, rows, ["a photo of a <a>"]) <= 240 and bounded.t_range[1] == 300

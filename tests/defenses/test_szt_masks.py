"""Mask providers: rectangles, GrabCut, attention and sensitivity, each on a picture where the answer is known."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from poisonshield import world
from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.diffusion.masks import attention, ssm
from poisonshield.defenses.diffusion.masks.attention import Attention, embed_prompts, word_attention
from poisonshield.defenses.diffusion.masks.box import Box, rectangle
from poisonshield.defenses.diffusion.masks.grabcut import GrabCut
from poisonshield.defenses.diffusion.masks.parts.otsu import cut, otsu
from poisonshield.defenses.diffusion.masks.ssm import SSM
from poisonshield.defenses.diffusion.szt import SZT
from poisonshield.errors import ConfigError, DataError
from poisonshield.methods.diffusion.textual_inversion import TextualInversion
from poisonshield.models.diffusion.sensitivity import semantic_sensitivity


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    made.add_placeholder("<a>")
    return made


def photos(height=32, width=32, keys=("a#0", "b#1"), seed=0):
    x = torch.rand(len(keys), 3, height, width, generator=torch.Generator().manual_seed(seed))
    return Batch(tuple(keys), (x * 255).round() / 255)


def szt(model, mask, init="circle", **settings):
    inits = [init[name] if isinstance(init, dict) else init for name in model.placeholders]
    context = Context(
        model=model, words=tuple(TextualInversion.start_word(TextualInversion.Config(init=one)) for one in inits)
    )
    defense = SZT(SZT.Config(mask=mask, **settings), context)
    defense.wrap(SimpleNamespace(name="m", trains_words=True))
    return defense


def test_otsu_equals_scikit_images():
    filters = pytest.importorskip("skimage.filters")
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        values = torch.cat([torch.randn(300, generator=draw), 4 + 2 * torch.randn(100, generator=draw)])
        values = values.double()
        step = float(values.max() - values.min()) / 256
        assert otsu(values) == pytest.approx(filters.threshold_otsu(values.numpy()), abs=1.01 * step)


def test_cut_parts_each_map_by_itself_and_flat_ones_are_empty():
    maps = torch.zeros(3, 1, 4, 4)
    maps[0, :, 1:3, 1:3], maps[1, :, :, :2] = 5.0, -0.001
    maps[1] -= 7
    mask = cut(maps, (4, 4))
    assert torch.equal(mask[0], (maps[0] > 0).float()) and torch.equal(mask[1, 0, 0], torch.tensor([0.0, 0, 1, 1]))
    assert mask[2].sum() == 0 and cut(maps, (16, 12)).shape == (3, 1, 16, 12)


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 0.7), (51, 70, 0.5), (8, 8, 1.0), (3, 3, 0.01)])
def test_box_is_a_centred_rectangle(height, width, side):
    mask = Box(Box.Config(side=side))(photos(height, width))
    assert mask.shape == (2, 1, height, width) and set(mask.unique().tolist()) <= {0.0, 1.0}
    rows, columns = mask[0, 0].amax(1).nonzero()[:, 0], mask[0, 0].amax(0).nonzero()[:, 0]
    assert len(rows) == max(1, round(side * height)) and len(columns) == max(1, round(side * width))
    assert mask[0].sum() == len(rows) * len(columns)
    assert abs((rows[0] + rows[-1]) / 2 - (height - 1) / 2) <= 0.5
    assert abs((columns[0] + columns[-1]) / 2 - (width - 1) / 2) <= 0.5
    assert rectangle(height, width, side) == (int(columns[0]), int(rows[0]), len(columns), len(rows))


def test_grabcut_finds_a_disc_on_a_plain_ground():
    pytest.importorskip("cv2")
    y, x = torch.arange(64)[:, None] - 30.0, torch.arange(64)[None] - 34.0
    disc = (x**2 + y**2 < 15**2).float()[None, None]
    noise = 0.03 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    colors = torch.tensor([0.9, 0.2, 0.1]).view(1, 3, 1, 1), torch.tensor([0.3, 0.5, 0.6]).view(1, 3, 1, 1)
    batch = Batch(("p",), (colors[0] * disc + colors[1] * (1 - disc) + noise).clamp(0, 1))
    provider = GrabCut(GrabCut.Config(side=0.7))
    mask = provider(batch)
    iou = torch.minimum(mask, disc).sum() / torch.maximum(mask, disc).sum()
    assert mask.shape == disc.shape and set(mask.unique().tolist()) == {0.0, 1.0} and iou > 0.95
    assert torch.equal(provider(batch), mask)
    with pytest.raises(ConfigError, match="no ground"):
        GrabCut(GrabCut.Config(side=1.0))(batch)


def test_grabcut_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[opencv\]'"):
        GrabCut(GrabCut.Config(side=0.7))(photos())


def test_word_marks_its_own_tokens(model):
    context, marked = embed_prompts(model, ["circle", "blue circle", "circle"])
    ids = model.tokens(["a photo of a circle", "a photo of a blue circle"])
    word = lambda text: model.tokenizer(text, add_special_tokens=False).input_ids
    assert ids[0][marked[0]].tolist() == word("circle") and ids[1][marked[1]].tolist() == word("blue circle")
    assert torch.equal(marked[0], marked[2]) and torch.equal(context[0], context[2])
    torch.testing.assert_close(context[1], model.text(ids)[1])


def slow_attention(layer, hidden, text):
    """softmax(q k / sqrt(d)), head by head."""
    query, key = layer.to_q(hidden)[0], layer.to_k(text)[0]
    size = query.shape[1] // layer.heads
    parts = [
        torch.softmax(query[:, h * size : (h + 1) * size] @ key[:, h * size : (h + 1) * size].T / size**0.5, dim=1)
        for h in range(layer.heads)
    ]
    return sum(parts) / layer.heads  # [positions, L]


@pytest.mark.parametrize("side", [(16, 16), (13, 10)])
def test_attention_to_a_word_equals_a_loop_over_heads(model, side):
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(1, 4, *side, generator=draw), torch.tensor([500])
    context, marked = embed_prompts(model, ["blue circle"])
    calls = []
    layers = [m for m in model.unet.modules() if getattr(m, "is_cross_attention", False)]
    hooks = [
        m.register_forward_pre_hook(
            lambda m, a, k: calls.append((m, a[0], k["encoder_hidden_states"])), with_kwargs=True
        )
        for m in layers
    ]
    with torch.no_grad():
        found = word_attention(model, z, t, context, marked)
        for hook in hooks:
            hook.remove()
        assert len(found) == len(calls) == len(layers) > 0
        half = tuple(-(-s // 2) for s in side)
        for ours, (layer, hidden, text) in zip(found, calls, strict=True):
            wanted = slow_attention(layer, hidden, text)[:, marked[0]].mean(1).view(1, 1, *half)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
    assert not any(m._forward_pre_hooks for m in layers)


def test_attention_mask_fits_any_size_and_depends_on_its_own_picture(model):
    batch, provider = photos(51, 70), Attention()
    mask = provider(batch, model, ["circle", "blue star"])
    assert mask.shape == (2, 1, 51, 70) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(provider(batch, model, ["circle", "blue star"]), mask)
    alone = provider(Batch(("b#9",), batch.x[1:]), model, ["blue star"])
    assert (alone != mask[1:]).float().mean() < 0.01  # sums in another order move a pixel at the threshold


def test_attention_follows_where_the_network_looks(model, monkeypatch):
    """With a U-Net that attends to the word on the left half, the left half is the mask."""
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    monkeypatch.setattr(attention, "word_attention", lambda model, z, *rest: [left.expand(len(z), -1, -1, -1)])
    mask = Attention()(photos(), model, ["circle", "circle"])
    assert mask[..., :15].min() == 1 and mask[..., 17:].max() == 0


def test_ssm_is_the_sensitivity_of_the_words_vector_cut_in_two(model, monkeypatch):
    monkeypatch.setattr(ssm, "_PROBES", 4)
    batch = photos(keys=("a#0",))
    mask = SSM(seed=3)(batch, model, ["circle"])
    maps = semantic_sensitivity(
        model,
        batch.x,
        rows=model.word_vector("circle")[None],
        prompt="a photo of a <a>",
        timesteps=[300, 500, 700],
        mode="pred_jac",
        probes=4,
        noises=2,
        seed=3,
        keys=["a"],
    ).maps
    mean = sum(m / m.sum() for m in maps[0])[None, None] / 3
    assert mask.shape == (1, 1, 32, 32) and torch.equal(mask, cut(mean, (32, 32)))
    assert SSM(seed=3)(photos(31, 30, ("a#0",)), model, ["circle"]).shape == (1, 1, 31, 30)


def test_ssm_before_any_learned_word_is_refused():
    with pytest.raises(ConfigError, match="Wrap the method first"):
        SSM()(photos(), tiny_model(), ["circle"] * 2)


def test_masks_are_made_of_the_purified_picture(model):
    seen = {}

    def provider(batch, model, words):
        seen.update(x=batch.x, words=words)
        return torch.ones(len(batch), 1, *batch.x.shape[2:]) * 0.5

    provider.needs_word = True
    batch, defense = photos(64, 64), szt(model, "attention", purifier="median")
    defense._masks = provider
    out = defense.before(batch)
    assert torch.equal(seen["x"], out.x) and not torch.equal(out.x, batch.x) and torch.all(out.mask == 0.5)
    assert seen["words"] == ["circle", "circle"]


def test_word_is_the_settings_or_what_the_method_starts_from(model):
    with pytest.raises(ConfigError, match="mask.word"):
        szt(model, "attention", init="normal:0.02")
    assert szt(model, {"name": "attention", "word": "star"}, init="zeros").before(photos()).mask.shape == (2, 1, 32, 32)
    two = tiny_model()
    for token in ("<x>", "<y>"):
        two.add_placeholder(token)
    defense = szt(two, "ssm", init={"<x>": "circle", "<y>": "star"})
    assert defense._words_of(photos().replace(y=torch.tensor([1, 0]))) == ["star", "circle"]


def test_overlap_with_a_given_mask_is_noted_beside_an_automatic_one(model):
    batch = photos(64, 64)
    given = torch.zeros(2, 1, 64, 64)
    given[:, :, 10:54, 10:54] = 1
    defense = szt(model, {"name": "box", "side": 44 / 64})
    out = defense.before(batch.replace(mask=given))
    assert torch.equal(out.mask, given) and defense.ious == {"a": 1.0, "b": 1.0}
    half = szt(model, {"name": "box", "side": 0.5})
    half.before(batch.replace(mask=given))
    assert half.ious["a"] == pytest.approx(32**2 / 44**2)


def test_empty_automatic_mask_is_refused_by_its_key(model):
    """Attention that is the same everywhere tells of no object."""
    defense = szt(model, "attention")
    defense._masks = lambda batch, *rest: cut(torch.ones(len(batch), 1, 4, 4), tuple(batch.x.shape[2:]))
    defense._masks.needs_word = False
    with pytest.raises(DataError, match="mask of a#0 is empty"):
        defense.before(photos())


def test_grabcut_on_rendered_pictures_beats_the_box():
    pytest.importorskip("cv2")
    shown = [world.render(i, seed=11) for i in range(6)]
    batch = Batch(tuple(f"p{i}" for i in range(6)), torch.stack([p.x for p in shown]))
    truth = torch.stack([p.mask for p in shown])

    def iou(mask):
        return (torch.minimum(mask, truth).sum((1, 2, 3)) / torch.maximum(mask, truth).sum((1, 2, 3))).median().item()

    assert iou(GrabCut(GrabCut.Config(side=0.95))(batch)) > iou(Box(Box.Config(side=0.7))(batch))


@pytest.mark.parametrize("kind", [Attention, SSM])
def test_word_masks_ask_for_the_pipeline_and_for_words(model, kind):
    with pytest.raises(ConfigError, match="Give it a pipeline"):
        kind()(photos(), None, ["circle", "circle"])
    with pytest.raises(ConfigError, match="Give it a word for each picture"):
        kind()(photos(), model, None)

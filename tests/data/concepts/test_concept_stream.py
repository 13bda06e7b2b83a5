"""The stream over concepts: what a concept shows depends on nothing but itself, and masks go where pictures go."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import tiny_model

from poisonshield.batch import Batch
from poisonshield.data.concepts import Concept, ConceptImage
from poisonshield.data.concepts.prompts import TEMPLATES
from poisonshield.data.concepts.stream import ConceptStream
from poisonshield.defenses.jpeg import JPEG
from poisonshield.errors import CheckpointError, ConfigError, DataError, ShapeError
from poisonshield.models.diffusion.latents import LatentCache
from poisonshield.ops import jpeg
from poisonshield.world.rendered import rendered_concepts

SIDE = 16


def concept(name, count=5, masks=True, seed=0):
    """Random pictures with masks of different numbers of pixels."""
    rng = np.random.default_rng([seed, *name.encode()])
    images = []
    for i in range(count):
        pixels = torch.from_numpy(rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8))
        mask = torch.from_numpy((rng.random((1, SIDE, SIDE)) < 0.3).astype(np.float32))
        images.append(ConceptImage.of(name, str(i), pixels, mask if masks else None, f"a {name} of kind {i}"))
    return Concept.of(name, images)


THREE = (concept("cup", 5), concept("hat", 4), concept("dog", 6))
TOKENS = {"cup": "<cup>", "hat": "<hat>", "dog": "<dog>", "yellow_ring": "<ring>"}


def stream(concepts=THREE, **options):
    return ConceptStream(concepts, **({"batch_size": 4, "seed": 7, "tokens": TOKENS} | options))


def take(source, count):
    return list(islice(iter(source), count))


def same(a: Batch, b: Batch):
    assert (a.keys, a.captions, a.draw, a.t_range) == (b.keys, b.captions, b.draw, b.t_range)
    assert torch.equal(a.x, b.x) and torch.equal(a.mask, b.mask)


def of(batch, number):
    """The part of a batch that is one concept's."""
    own = (batch.y == number).nonzero()[:, 0].tolist()
    pick = lambda values: tuple(values[i] for i in own)
    return batch.replace(
        keys=pick(batch.keys), captions=pick(batch.captions), x=batch.x[own], mask=batch.mask[own], y=batch.y[own]
    )


def joined(parts):
    return Batch(
        keys=tuple(k for p in parts for k in p.keys), captions=tuple(c for p in parts for c in p.captions),
        x=torch.cat([p.x for p in parts]), mask=torch.cat([p.mask for p in parts]), draw=parts[0].draw,
    )  # fmt: skip


def test_each_concept_draws_the_same_alone_and_beside_others_in_any_order():
    together, turned = take(stream(), 12), take(stream(THREE[::-1]), 12)
    for number, one in enumerate(THREE):
        for step, alone in enumerate(take(stream([one]), 12)):
            same(alone, of(together[step], number))
            same(alone, of(turned[step], 2 - number))
    assert together[0].y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and together[0].y.dtype == torch.int64


def test_two_ranks_share_what_one_rank_has():
    whole = take(stream(), 6)
    halves = [take(stream(rank=rank, world_size=2), 6) for rank in range(2)]
    for step, batch in enumerate(whole):
        for number in range(3):
            same(of(batch, number), joined([of(halves[rank][step], number) for rank in range(2)]))
    assert [len(b) for b in halves[0]] == [6] * 6


def test_pixels_and_masks_are_those_of_the_key_and_flips_act_on_both_alike():
    known = {image.key: image for one in THREE for image in one.images}
    flipped = 0
    for batch in take(stream(), 20):
        for key, x, mask in zip(batch.keys, batch.x, batch.mask, strict=True):
            picture, _, turned = key.partition("#")[0].partition(":")
            image = known[picture]
            x, mask = (x.flip(-1), mask.flip(-1)) if turned else (x, mask)
            assert torch.equal(x, image.pixels.float() / 255) and torch.equal(mask, image.mask)
            flipped += bool(turned)
    assert 90 < flipped < 150  # of 240, at a probability of a half


def test_a_marked_pixel_stays_under_its_mask():
    """One white pixel, and a mask of that pixel: wherever the flip takes it, the mask must lie on it."""
    images = []
    for i, (row, column) in enumerate([(2, 3), (9, 0), (15, 15)]):
        pixels, mask = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(1, SIDE, SIDE)
        pixels[:, row, column], mask[0, row, column] = 255, 1
        images.append(ConceptImage.of("cup", str(i), pixels, mask))
    seen = set()
    for batch in take(stream([Concept.of("cup", images)]), 20):
        assert torch.equal(batch.x.mean(1, keepdim=True), batch.mask)
        seen |= {tuple(place) for place in batch.mask.nonzero()[:, 2:].tolist()}
    assert seen == {(2, 3), (2, 12), (9, 0), (9, 15), (15, 15), (15, 0)}


def test_every_picture_is_shown_once_before_any_again():
    shown = [key.partition("@")[0] for batch in take(stream([THREE[0]], batch_size=3), 25) for key in batch.keys]
    for epoch in range(15):
        assert sorted(shown[5 * epoch : 5 * epoch + 5]) == [f"cup/{i}" for i in range(5)]
    assert len({tuple(shown[5 * e : 5 * e + 5]) for e in range(15)}) > 5  # in a new order
    assert stream(batch_size=3).steps_per_epoch == 2 and stream(batch_size=8).steps_per_epoch == 1
    assert Counter(k.partition("@")[0] for k in take(stream([THREE[1]], batch_size=8), 1)[0].keys) == {
        f"hat/{i}": 2 for i in range(4)
    }


def test_the_draw_is_the_step_and_the_epoch_counts_whole_ones():
    batches = take(stream(batch_size=2), 9)  # the largest concept has 6 pictures: 3 steps show all
    assert [b.draw for b in batches] == list(range(9)) and [b.epoch for b in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_draws_differ_by_step_slot_and_seed():
    first, second = take(stream([THREE[1]], batch_size=8, flip=0.0), 2)
    assert first.draw == 0 and second.draw == 1
    assert [key.rpartition("#")[2] for key in first.keys] == [str(i) for i in range(8)]
    noise = first.random(0).normal("noise", 4)
    assert len({tuple(row) for row in noise.tolist()}) == 8  # though each picture comes twice
    assert not (noise == second.random(0).normal("noise", 4)).any()
    other = take(stream([THREE[1]], batch_size=8, flip=0.0, seed=8), 1)[0]
    assert other.keys != first.keys or other.captions != first.captions
    assert all(":flip" in key for key in take(stream(flip=1.0), 1)[0].keys)


def test_resumption_goes_on_with_the_very_next_batch():
    whole = take(stream(), 10)
    source = stream()
    take(source, 4)
    state = source.state_dict()
    fresh = stream()
    fresh.load_state_dict(state)
    for a, b in zip(take(fresh, 6), whole[4:], strict=True):
        same(a, b)
    half = stream(rank=1, world_size=2)
    half.load_state_dict(state)
    same(of(take(half, 1)[0], 1), of(take(stream(rank=1, world_size=2), 5)[4], 1))


@pytest.mark.parametrize(
    "other, named",
    [
        ({"concepts": (concept("cup", 5, seed=1), *THREE[1:])}, "concepts"),
        ({"concepts": THREE[::-1]}, "order"),
        ({"seed": 8}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"flip": 0.0}, "flip"),
        ({"prompts": "caption"}, "prompts"),
        ({"prompts": ["the {}"]}, "prompts"),
        ({"tokens": TOKENS | {"cup": "<mug>"}}, "tokens"),
        ({"stage": lambda batch: batch.replace(x=batch.x / 2)}, "purified"),
        ({"stage": lambda batch: batch.replace(mask=batch.mask / 2)}, "purified"),
    ],
)
def test_a_position_of_other_data_or_settings_is_refused_by_name(other, named):
    state = stream().state_dict()
    with pytest.raises(CheckpointError, match=f"{named}: saved"):
        stream(**other).load_state_dict(state)


def test_prompts_come_from_the_templates_all_of_them():
    captions = [c for batch in take(stream([THREE[0]]), 100) for c in batch.captions]
    assert set(captions) == {t.replace("{}", "<cup>") for t in TEMPLATES}
    assert set(take(stream(prompts=["{} on a {}"]), 1)[0].captions) == {
        f"<{n}> on a <{n}>" for n in ("cup", "hat", "dog")
    }
    batch = take(stream(prompts="caption"), 1)[0]
    for key, prompt in zip(batch.keys, batch.captions, strict=True):
        name, _, stem = key.partition("@")[0].partition("/")
        assert prompt.endswith(f"<{name}>, a {name} of kind {stem}") and not prompt.startswith(",")


def counted(quality=25):
    """A JPEG stage that notes what it was given."""
    defense, calls = JPEG(JPEG.Config(quality=quality)), []

    def stage(batch):
        calls.append(batch)
        return defense.before(batch).replace(t_range=(500, 1000))

    return stage, calls


def test_the_stage_sees_each_concept_once_and_whole_before_the_flip():
    stage, calls = counted()
    batches = take(stream(stage=stage), 10)
    assert [len(c) for c in calls] == [5, 4, 6]
    assert calls[1].keys == tuple(i.key for i in THREE[1].images) and calls[1].y.tolist() == [1] * 4
    assert calls[0].captions[3] == "a cup of kind 3" and calls[0].mask.shape == (5, 1, SIDE, SIDE)
    assert all(batch.t_range == (500, 1000) for batch in batches)


def test_flipped_entries_are_the_flip_of_the_compressed_picture():
    ring = rendered_concepts(3, seed=2, kinds=[("yellow", "ring")])
    originals = {i.stem: i.pixels[None].float() / 255 for i in ring[0].images}
    wrong_order = 0
    for batch in take(stream(ring, stage=counted()[0]), 6):
        for key, x in zip(batch.keys, batch.x, strict=True):
            original = originals[key.partition("@")[0].partition("/")[2]]
            compressed = jpeg(original, 25, subsampling="420", mode="exact")
            if ":flip" in key:
                assert torch.equal(x, compressed[0].flip(-1))
                wrong_order += not torch.equal(x, jpeg(original.flip(-1), 25, subsampling="420", mode="exact")[0])
            else:
                assert torch.equal(x, compressed[0])
    assert wrong_order > 0  # the order matters: the test can fail


def test_keys_follow_the_pixels_that_the_stage_leaves():
    keys = {}
    for quality in (None, 25, 50):
        stage = None if quality is None else counted(quality)[0]
        keys[quality] = {k.partition("#")[0] for batch in take(stream(stage=stage), 10) for k in batch.keys}
    assert not keys[25] & keys[50] and not keys[None] & keys[25]
    assert {k.removesuffix(":flip") for k in keys[None]} == {i.key for one in THREE for i in one.images}
    strip = lambda all_of_them: {k.partition("@")[0] for k in all_of_them}
    assert strip(keys[25]) == strip(keys[None])


def test_a_latent_cache_holds_two_entries_a_picture_and_gives_what_encoding_gives():
    ring = rendered_concepts(3, seed=2, kinds=[("yellow", "ring")], size=32)
    model = tiny_model()
    cache = LatentCache(model)
    for batch in take(stream(ring, stage=counted()[0]), 8):
        torch.testing.assert_close(cache(batch), model.encode(batch.x), rtol=0, atol=1e-5)
    assert len(cache.known) == 6


def noisy(batch):
    """A stage that draws anew in each epoch."""
    noise = batch.random(3).uniform("background", 3 * SIDE * SIDE).view_as(batch.x)
    return batch.replace(x=torch.where(batch.mask > 0.5, batch.x, noise))


def test_a_stage_that_draws_anew_does_so_each_epoch_of_its_concept():
    seen = {}
    for variants, number in ((None, 10), (3, 3)):
        source = stream(THREE[:1], stage=noisy, batch_size=5, flip=0.0, per_epoch=True, variants=variants)
        batches = take(source, 10)  # 5 pictures: each step is an epoch
        seen[variants] = {key.partition("#")[0] for batch in batches for key in batch.keys}
        assert len(seen[variants]) == 5 * number
    once = {k.partition("#")[0] for b in take(stream(THREE[:1], stage=noisy, flip=0.0), 10) for k in b.keys}
    assert len(once) == 5 and once < seen[3]
    assert seen[3] < seen[None]
    together = take(stream(stage=noisy, per_epoch=True), 8)
    for step, alone in enumerate(take(stream(THREE[1:2], stage=noisy, per_epoch=True), 8)):
        same(alone, of(together[step], 1))
    resumed = stream(stage=noisy, per_epoch=True)
    resumed.load_state_dict(stream(stage=noisy, per_epoch=True).state_dict() | {"position": 5})
    same(take(resumed, 1)[0], together[5])


def test_a_stage_may_make_masks_where_there_were_none():
    bare = [concept("cup", 3, masks=False), concept("hat", 3, masks=False)]
    assert take(stream(bare), 1)[0].mask is None
    made = take(stream(bare, stage=lambda b: b.replace(mask=b.x[:, :1].round())), 1)[0]
    assert torch.equal(made.mask, made.x[:, :1].round())
    with pytest.raises(DataError, match="one has a mask and one has none"):
        stream([bare[0], THREE[1]])
    only_cups = lambda b: b.replace(mask=b.x[:, :1]) if b.keys[0].startswith("cup") else b
    with pytest.raises(DataError, match="hat/.* has no mask after the defense"):
        take(stream(bare, stage=only_cups), 1)


def test_what_a_stage_must_not_do_is_refused():
    for told, change in {
        "same shape": lambda b: b.replace(x=b.x[:2]),
        "gave masks": lambda b: b.replace(mask=b.mask[:, 0]),
    }.items():
        with pytest.raises(ShapeError, match=told):
            take(stream(stage=change), 1)
    for x in (lambda b: b.x * 2 - 1, lambda b: b.x * float("nan")):
        with pytest.raises(DataError, match="must be in \\[0, 1\\]"):
            take(stream(stage=lambda b, x=x: b.replace(x=x(b))), 1)
    by_concept = lambda b: b.replace(t_range=(100 * int(b.y[0]), 1000))
    with pytest.raises(ConfigError, match="other timesteps for each concept.*one at a time"):
        take(stream(stage=by_concept), 1)


def test_settings_that_do_not_fit_are_refused():
    for told, options in {
        "multiple of the ranks": {"batch_size": 3, "world_size": 2},
        "a probability": {"flip": 1.5},
        "no token is given for concept 'cup'": {"tokens": {}},
        "templates, caption, or a list": {"prompts": "captions"},
        "has no {}": {"prompts": ["a photo"]},
        "the empty list": {"prompts": []},
        "each once": {"concepts": (THREE[0], THREE[0])},
    }.items():
        with pytest.raises(ConfigError, match=told):
            stream(**options)
    big = Concept.of("big", [ConceptImage.of("big", "0", torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1, 8, 8))])
    with pytest.raises(DataError, match="another size"):
        stream((THREE[0], big), tokens=TOKENS | {"big": "<big>"})
    mute = Concept.of("cup", [ConceptImage.of("cup", "00", THREE[0].images[0].pixels)])
    with pytest.raises(DataError, match="cup/00@.* has no caption"):
        take(stream((mute,), prompts="caption"), 1)

"""The concept judge: what it says, what it refuses, and that lessons show what their labels say."""

import math

import pytest
import torch
from tiny import tiny_model

from poisonshield import world
from poisonshield.errors import CheckpointError, ConfigError, ShapeError
from poisonshield.world import judge_changes as changes
from poisonshield.world import judge_lessons as made
from poisonshield.world import judge_textures as textures
from poisonshield.world.judge import ConceptJudge
from poisonshield.world.judge_training import train_judge

KINDS = [(c, s) for c in world.COLORS for s in world.SHAPES]
FEW = [("red", "circle"), ("yellow", "cross"), ("red", "cross"), ("yellow", "circle")]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def few(i):
    return world.render(i, seed=5, only=FEW)


@pytest.fixture(scope="module")
def objects():
    return made.Objects.of([world.render(i, seed=3, only=KINDS) for i in range(120)])


@pytest.fixture(scope="module")
def short():
    """Two shapes and two colours, in seconds."""
    return train_judge(few, steps=260, objects=160, checks=32)


def test_a_judge_trained_for_seconds_knows_objects_and_lets_textures_fall(short):
    pictures = [world.render(i, seed=6, only=[("yellow", "circle")]) for i in range(60)]
    x = torch.stack([p.x for p in pictures])
    right = short.fidelity(x, "yellow", "circle")
    assert right["share"] >= 0.8 and right["none"] <= 0.2
    assert short.fidelity(x, "yellow", "cross")["share"] <= 0.1
    assert short.fidelity(x, "red", "circle")["share"] <= 0.1
    assert short.fidelity(textures.draw_grounds(60, 64, rng()), "yellow", "circle")["share"] <= 0.1
    assert short.fidelity(changes.shuffle(x, rng()), "yellow", "circle")["share"] <= 0.1


def test_training_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a = train_judge(few, steps=3, objects=24, checks=8)
    assert torch.equal(before, torch.get_rng_state())
    b, c = train_judge(few, steps=3, objects=24, checks=8), train_judge(few, steps=3, objects=24, checks=8, seed=1)
    same = [torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]
    assert all(same)
    assert not torch.equal(a.color_head.weight, c.color_head.weight)
    assert {"ground", "shuffled", "mixed", "foreign", "broken", "cut", "blobs"} < a.record["held_back"].keys()


def test_lessons_go_through_a_pipeline_where_one_is_given():
    model = tiny_model(size=64)
    calls = []
    handle = model.vae.encoder.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    judge = train_judge(few, steps=4, objects=24, checks=8, model=model)
    handle.remove()
    assert sum(calls) > 4 * 6 and judge.record["vae"] == "tiny random"
    assert "whole_vae_joint" in judge.record["held_back"]


def test_a_saved_judge_is_small_and_says_the_same(short, tmp_path):
    assert sum(p.numel() for p in short.parameters()) <= 100_000
    path = tmp_path / "judge.safetensors"
    short.save(path)
    assert path.stat().st_size <= 300_000
    loaded = ConceptJudge.load(path)
    assert (loaded.colors, loaded.shapes, loaded.size) == (short.colors, short.shapes, 64)
    assert loaded.record["held_back"] == short.record["held_back"]
    x = torch.stack([few(i).x for i in range(20)])
    a, b = short.fidelity(x, "red", "cross"), loaded.fidelity(x, "red", "cross")
    assert all(abs(a[k] - b[k]) <= 0.05 for k in a) and abs(a["joint"] - b["joint"]) <= 0.01


def test_fidelity_is_the_product_of_both_heads_probabilities():
    torch.manual_seed(0)
    judge = ConceptJudge(("red", "blue"), ("ring", "star"), size=32)
    judge.temperature.copy_(torch.tensor([2.0, 0.5]))
    x = torch.rand(7, 3, 32, 32, generator=rng())
    judge.train()
    told = judge.fidelity(x, "blue", "ring", micro_batch=3)
    assert judge.training
    judge.eval().requires_grad_(False)
    h = judge.features(x)
    color = (judge.color_head(h) / 2).exp()
    shape = (judge.shape_head(h) / 0.5).exp()
    p = [float(color[i, 1] / color[i].sum() * shape[i, 0] / shape[i].sum()) for i in range(7)]
    assert told["joint"] == pytest.approx(sum(p) / 7, rel=1e-5)
    assert told["share"] == sum(q > 0.5 for q in p) / 7
    assert told["none"] == pytest.approx(float((shape[:, 2] / shape.sum(1) > 0.5).float().mean()))


def test_calibration_finds_the_scale_of_the_logits():
    judge = ConceptJudge(("a", "b"), ("c", "d"))
    generator = rng()
    logits = 3 * torch.randn(4000, 3, generator=generator)
    y = torch.multinomial((logits / 3).softmax(1), 1, generator=generator)[:, 0]
    sure = torch.randn(4000, 3, generator=generator)
    z = torch.multinomial((sure / 0.5).softmax(1), 1, generator=generator)[:, 0]
    labels = torch.stack([y, z], 1)
    labels[::7, 0] = made.IGNORED
    judge.calibrate((logits, sure), labels)
    assert judge.temperature.tolist() == pytest.approx([3.0, 0.5], rel=0.12)


def test_what_does_not_fit_is_refused_in_words(short, tmp_path):
    with pytest.raises(ShapeError, match="3, 64, 64"):
        short.fidelity(torch.rand(1, 3, 32, 32), "red", "circle")
    with pytest.raises(ShapeError, match="no pictures"):
        short.fidelity(torch.rand(0, 3, 64, 64), "red", "circle")
    with pytest.raises(ConfigError, match="'green' is no colour"):
        short.fidelity(torch.rand(1, 3, 64, 64), "green", "circle")
    with pytest.raises(ConfigError, match="'ring' is no shape"):
        short.fidelity(torch.rand(1, 3, 64, 64), "red", "ring")
    with pytest.raises(ConfigError, match="does not exist"):
        ConceptJudge.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no whole judge"):
        ConceptJudge.load(tmp_path / "broken.safetensors")


def test_labels_say_what_each_lesson_keeps(objects):
    none = (6, 6)
    assert (objects.no_color, objects.no_shape) == none
    expected = {
        "whole": (None, None),
        "ground": none,
        "shuffled": (made.IGNORED, 6),
        "mixed": (6, None),
        "foreign": (6, None),
        "broken": (None, 6),
        "cut": (None, 6),
        "blobs": (None, 6),
    }
    assert made.KINDS.keys() == expected.keys()
    for name, kind in made.KINDS.items():
        x, labels = kind.make(objects, rng())
        assert x.shape == (120, 3, 64, 64) and x.min() >= 0 and x.max() <= 1
        for column, value in enumerate(expected[name]):
            wanted = objects.labels[:, column] if value is None else torch.full((120,), value)
            assert torch.equal(labels[:, column], wanted), name


def test_objects_know_their_names_and_paint(objects):
    for i in range(20):
        picture = world.render(i, seed=3, only=KINDS)
        assert objects.colors[objects.labels[i, 0]] == picture.color
        assert objects.shapes[objects.labels[i, 1]] == picture.shape
        assert (objects.paint[i] - torch.tensor(world.COLORS[picture.color])).abs().max() <= 0.12
    assert objects.tones.shape == (6, 3)


def test_mixed_batches_hold_every_kind_and_repeat(objects):
    x, labels = made.make_lessons(objects, 200, rng(1))
    again, same = made.make_lessons(objects, 200, rng(1))
    assert torch.equal(x, again) and torch.equal(labels, same)
    assert 60 <= int((labels[:, 1] < 6).sum()) <= 170
    only, _ = made.make_lessons(objects, 10, rng(), kinds={"ground": made.KINDS["ground"]})
    assert only.shape == (10, 3, 64, 64)


def test_broken_and_cut_masks_lost_a_good_part(objects):
    mask = objects.mask.float() / 255
    area = mask.sum((1, 2, 3))
    broken = changes.break_up(mask, rng()).sum((1, 2, 3)) / area
    assert broken.min() >= 0.25 and broken.max() <= 0.7
    kept = changes.cut(mask, rng()).sum((1, 2, 3)) / area
    assert float(kept.mean()) <= 0.65 and float((kept > 0.85).float().mean()) <= 0.05
    covered = changes.draw_blobs(mask, rng()).mean((1, 2, 3))
    assert covered.min() >= 0.08 and covered.max() <= 0.52


def test_swelling_is_one_pixel_less_to_two_more_all_around():
    disc = torch.zeros(200, 1, 32, 32)
    disc[:, :, 10:20, 8:20] = 1
    areas = set(changes.swell(disc, rng()).sum((1, 2, 3)).tolist())
    assert areas == {8 * 10, 10 * 12, 12 * 14, 14 * 16}


def test_shuffling_moves_tiles_and_loses_no_pixel():
    x = torch.rand(3, 3, 64, 64, generator=rng())
    moved = changes.shuffle(x, rng())
    assert not torch.equal(moved, x)
    assert torch.equal(moved.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
    tiles = {
        tuple(t.flatten().tolist()) for t in x[0].unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)
    }
    assert tuple(moved[0, :, 8:16, 16:24].flatten().tolist()) in tiles


def test_foreign_colours_are_far_from_known_ones_and_mixtures_hold_only_known_ones(objects):
    mask = (objects.mask > 254).expand(-1, 3, -1, -1)
    x, _ = made.show_foreign(objects, rng())
    for picture, inside in zip(x, mask, strict=True):
        seen = picture[inside].view(3, -1).mean(1)
        assert float((objects.tones - seen).norm(dim=1).amin()) > 0.2
    paint = textures.draw_mixtures(20, 64, objects.tones, rng()).permute(0, 2, 3, 1).reshape(-1, 3)
    assert float(torch.cdist(paint[:5000], objects.tones).amin(1).max()) <= 1e-3


def test_blur_is_a_gaussian_and_spares_the_unchosen():
    x = torch.rand(2, 3, 64, 64, generator=rng())
    out = changes.blur(x, torch.tensor([1.0, 1.0]), torch.tensor([True, False]))
    line = [math.exp(-0.5 * k * k) for k in range(-4, 5)]
    total = sum(line)
    expected = sum(
        line[i + 4] * line[j + 4] / total**2 * x[0, :, 30 + i, 20 + j] for i in range(-4, 5) for j in range(-4, 5)
    )
    assert torch.allclose(out[0, :, 30, 20], expected, atol=1e-5)
    assert torch.equal(out[1], x[1])


def test_softened_pictures_stay_pictures(objects):
    x = objects.x.float() / 255
    soft = changes.soften(x, rng())
    assert soft.shape == x.shape and soft.min() >= 0 and soft.max() <= 1
    assert not torch.equal(soft, x)
    assert abs(float(soft.mean() - x.mean())) < 0.02


@pytest.mark.slow
def test_a_whole_training_meets_its_numbers():
    """Four minutes. The negatives here are of kinds that no lesson shows."""
    judge = train_judge(lambda i: world.render(i, seed=77, only=KINDS))
    told = judge.record["held_back"]
    assert told["whole_color"] >= 0.97 and told["whole_shape"] >= 0.9 and told["whole_joint"] >= 0.8
    assert all(told[k] <= 0.12 for k in ("ground", "shuffled", "mixed", "foreign", "broken", "cut", "blobs"))
    for name, x in unknown_textures(128).items():
        color, shape = (h.softmax(1)[:, :-1] for h in judge(x))
        any_pair = float(((color.amax(1) * shape.amax(1)) > 0.5).float().mean())
        print(name, any_pair)
        assert any_pair <= 0.06, name


def unknown_textures(count):
    """Textures in the world's own colours, none with an object."""
    g = rng(11)
    tones = torch.tensor(list(world.COLORS.values()))
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    points, spots = torch.rand(count, 24, 2, generator=g) * 64, torch.stack([y, x], -1).view(1, -1, 2).float()
    nearest = torch.cdist(spots.expand(count, -1, -1), points).argmin(-1)
    paint = tones[torch.randint(6, (count, 24), generator=g)]
    side = torch.randint(4, 17, (count, 1, 1), generator=g)
    board = ((y // side + x // side) % 2)[:, None].float()
    two = tones[torch.rand(count, 6, generator=g).argsort(1)[:, :2]][..., None, None]
    waves = torch.sin(0.2 * x + 0.9 * torch.rand(count, 1, 1, generator=g) * y)[:, None].gt(0).float()
    return {
        "yellow 1/f": (tones[3].view(1, 3, 1, 1) + 0.3 * (textures.draw_grounds(count, 64, g) - 0.5)).clamp(0, 1),
        "voronoi": paint.gather(1, nearest[..., None].expand(-1, -1, 3)).permute(0, 2, 1).reshape(count, 3, 64, 64),
        "checkers": board * two[:, 0] + (1 - board) * two[:, 1],
        "stripes": waves * two[:, 0] + (1 - waves) * two[:, 1],
        "flat": two[:, 0].expand(-1, -1, 64, 64).contiguous(),
    }

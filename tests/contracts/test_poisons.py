"""What every poison keeps, whatever it is: found by scanning, so a newcomer is tested without a line here."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.errors import DataError, ShapeError
from poisonshield.random import sample_ids
from poisonshield.registry import Registry

POISONS = Registry("poisonshield.poisons", kind="poison")
CLASSES, SIZE, COUNT = 4, (16, 16), 24


def images(seed=0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (COUNT, 3, *SIZE), generator=draw)
    return Batch(tuple(f"k{i}" for i in range(COUNT)), levels / 255, y=torch.arange(COUNT) % CLASSES)


def part(batch, rows):
    return batch.replace(keys=tuple(batch.keys[i] for i in rows.tolist()), x=batch.x[rows], y=batch.y[rows])


@pytest.fixture(scope="module", params=POISONS.names())
def make(request):
    made = {}

    def poison(seed=0):
        if seed not in made:
            cls = POISONS.get(request.param)
            made[seed] = cls(cls.Config(), num_classes=CLASSES, image_size=SIZE, seed=seed)
            made[seed].fit([images()])
        return made[seed]

    return poison


def norm_of(change, norm):
    if norm == "linf":
        return change.abs().flatten(1).amax(1)
    if norm == "l2":
        return change.double().square().flatten(1).sum(1).sqrt()
    return (change.abs().amax(1) > 1e-6).flatten(1).sum(1)


def test_delta_keeps_the_declared_budget(make):
    poison = make()
    size = norm_of(poison.delta(images()), poison.norm or "linf")
    assert size.max() > 0
    assert poison.norm is None or size.max() <= poison.budget() * (1 + 1e-5)


def test_released_pixels_are_whole_levels_that_changed(make):
    batch = images()
    x = make().apply(batch).x
    assert 0 <= x.min() and x.max() <= 1 and torch.allclose(x * 255, (x * 255).round(), atol=1e-3)
    assert (x != batch.x).flatten(1).any(1).all()


def test_pixels_depend_on_the_key_and_not_on_order_or_batch(make):
    batch, poison = images(), make()
    whole = poison.apply(batch).x
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    assert torch.equal(poison.apply(part(batch, order)).x, whole[order])
    alone = torch.cat([poison.apply(part(batch, torch.tensor([i]))).x for i in range(COUNT)])
    assert torch.equal(alone, whole)
    later = poison.apply(batch.replace(epoch=7, draw=7)).x
    assert torch.equal(later, whole)


def test_same_seed_gives_the_same_pixels_and_random_state_is_left_alone(make):
    state, poison = torch.get_rng_state(), make()
    again = type(poison)(poison.config, num_classes=CLASSES, image_size=SIZE, seed=0)
    again.fit([part(images(), torch.arange(COUNT).flip(0)[:11]), part(images(), torch.arange(COUNT).flip(0)[11:])])
    assert torch.equal(again.apply(images()).x, poison.apply(images()).x)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_another_pattern_unless_the_data_decides(make):
    poison, other = make(0), make(1)
    assert torch.equal(poison.apply(images()).x, other.apply(images()).x) == poison.needs_data


def test_grain_says_what_shares_a_pattern(make):
    poison, batch = make(), images()
    grey = batch.replace(x=torch.full_like(batch.x, 0.5))
    delta = poison.delta(grey)
    same_class = torch.equal(delta[0], delta[CLASSES])
    assert same_class == (poison.grain == "class")
    assert not torch.equal(delta[0], delta[1])


def test_ratio_poisons_exactly_the_asked_share_and_leaves_the_rest(make):
    cls, batch = type(make()), images()
    poison = cls(cls.Config(), num_classes=CLASSES, image_size=SIZE, seed=0)
    poison.load_state_dict(make().state_dict())
    ids = sample_ids(batch.keys)
    for ratio, count in ((0.0, 0), (0.3, 7), (0.5, 12), (1.0, COUNT)):
        poison.choose(ids, ratio)
        changed = (poison.apply(batch).x != batch.x).flatten(1).any(1)
        assert int(changed.sum()) == count and torch.equal(changed, poison.chosen(ids))
        some = part(batch, torch.arange(5))
        assert torch.equal((poison.apply(some).x != some.x).flatten(1).any(1), changed[:5])


def test_recipe_gives_the_same_pixels(make, tmp_path):
    from poisonshield.poisons.release.recipe import load_recipe, save_recipe

    poison, names = make(), tuple("abcd")
    path = save_recipe(poison, tmp_path / "p.poison.safetensors", classes=names, data="0" * 64)
    again = load_recipe(path, classes=names, image_size=SIZE)
    assert path.stat().st_size < 100_000
    assert torch.equal(again.apply(images()).x, poison.apply(images()).x)
    with pytest.raises(DataError, match="or in another order"):
        load_recipe(path, classes=names[::-1], image_size=SIZE)
    with pytest.raises(DataError, match="made for images of 16x16, the data has 8x8"):
        load_recipe(path, classes=names, image_size=(8, 8))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.rand(COUNT, 3, 8, 8)}, ShapeError, "built for torch.float32"),
        ({"x": torch.rand(COUNT, 3, *SIZE) * 255}, ShapeError, "it takes"),
        ({"x": torch.randn(COUNT, 3, *SIZE)}, ShapeError, "Normalise inside the model"),
        ({"y": torch.full((COUNT,), CLASSES)}, DataError, "labels 4 to 4"),
        ({"y": None}, DataError, "one label per sample"),
    ],
)
def test_unfit_batch_is_refused(make, change, error, words):
    with pytest.raises(error, match=words):
        make().apply(images().replace(**change))


def test_empty_batch_stays_empty(make):
    assert len(make().apply(part(images(), torch.arange(0)))) == 0

"""What every poison of both halves keeps: found by scanning, so a newcomer is tested without a line here."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from poisons.diffusion.photos import picture, quick, settle
from quick_poisons import make_config
from tiny import tiny_model

from poisonshield.batch import Batch
from poisonshield.errors import DataError, ShapeError
from poisonshield.poisons.base import Poison
from poisonshield.poisons.learned.base import LearnedPoison
from poisonshield.random import sample_ids
from poisonshield.registry import Registry

KEYED = Registry("poisonshield.poisons", kind="poison")
DIFFUSION = Registry("poisonshield.poisons.diffusion", kind="diffusion poison")
CLASSES, SIZE, COUNT = 4, (16, 16), 24


def images(seed=0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (COUNT, 3, *SIZE), generator=draw)
    return Batch(tuple(f"k{i}" for i in range(COUNT)), levels / 255, y=torch.arange(COUNT) % CLASSES)


def photos() -> Batch:
    x = torch.stack([picture(i, SIZE) for i in range(3)])
    return Batch(("a", "b", "c"), x.float() / 255, y=torch.arange(3))


def part(batch, rows):
    return batch.replace(keys=tuple(batch.keys[i] for i in rows.tolist()), x=batch.x[rows], y=batch.y[rows])


def norm_of(change, norm):
    """The size of each sample's change, in pixel units or as a count: straight from the definition."""
    flat = change.double().flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    if norm in ("l2", "rms"):
        return flat.square().sum(1).sqrt() / (flat.shape[1] ** 0.5 if norm == "rms" else 1)
    return (change.abs().amax(1) > 1e-6).flatten(1).sum(1)


# Of both halves


@dataclass
class Case:
    """A poison to test: how one is made ready, given a seed, and what it is applied to."""

    make: Callable[[int], Poison]
    batch: Batch


@pytest.fixture(scope="module")
def pipeline():
    return settle(tiny_model())


@pytest.fixture(scope="module", params=[*KEYED.names(), *(f"diffusion/{name}" for name in DIFFUSION.names())])
def case(request) -> Case:
    half, _, name = request.param.rpartition("/")
    cls = (DIFFUSION if half else KEYED).get(name)

    def keyed(seed):
        poison = cls(make_config(cls, images()), num_classes=CLASSES, image_size=SIZE, seed=seed)
        poison.fit([images()])
        return poison

    def diffusion(seed):
        return cls(cls.Config(steps=2, **quick(cls)), model=request.getfixturevalue("pipeline"), seed=seed)

    return Case(diffusion, photos()) if half else Case(keyed, images())


def test_released_pixels_are_whole_levels_within_the_budget(case):
    poison, batch = case.make(0), case.batch
    x = poison.apply(batch).x
    assert x.dtype == torch.float32 and x.shape == batch.x.shape and 0 <= x.min() and x.max() <= 1
    assert torch.allclose(x * 255, (x * 255).round(), atol=1e-3)
    assert (x != batch.x).flatten(1).any(1).all()
    budget = poison.budget()
    assert (budget and budget.norm) == poison.norm  # what a table says of the default settings
    if budget is not None:
        half_levels = {"linf": 0.5, "rms": 0.5, "l2": 0.5 * x[0].numel() ** 0.5, "l0": 0.0}[budget.norm]
        assert norm_of(x - batch.x, budget.norm).max() <= budget.radius + half_levels / 255 + 1e-6


def test_same_seed_gives_the_same_pixels_and_global_random_numbers_are_left_alone(case):
    state = torch.get_rng_state()
    first, again = (case.make(0).apply(case.batch).x for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_depend_on_the_key_and_not_on_order_or_batch(case):
    batch, poison = case.batch, case.make(0)
    whole = poison.apply(batch).x
    order = torch.arange(len(batch)).roll(1)
    assert torch.equal(poison.apply(part(batch, order)).x, whole[order])
    assert torch.equal(poison.apply(batch.replace(epoch=7, draw=7)).x, whole)
    if not poison.coupled:
        alone = torch.cat([poison.apply(part(batch, torch.tensor([i]))).x for i in range(len(batch))])
        assert torch.equal(alone, whole)


def test_other_keys_give_other_pixels_where_each_sample_has_its_own(case):
    batch, poison = case.batch, case.make(0)
    renamed = batch.replace(keys=tuple(f"other {key}" for key in batch.keys))
    if isinstance(poison, LearnedPoison) and poison.grain == "sample":
        with pytest.raises(DataError, match="other k0 is none of them"):
            poison.apply(renamed)
        return
    same = torch.equal(poison.apply(renamed).x, poison.apply(batch).x)
    assert same == (poison.grain == "class")


def test_description_is_plain_json_and_says_what_it_is(case):
    poison = case.make(3)
    said = poison.describe()
    assert json.loads(json.dumps(said)) == said
    assert (said["name"], said["seed"], said["grain"]) == (poison.name, 3, poison.grain)
    assert type(poison.config).model_validate(said["config"]) == poison.config
    budget = poison.budget()
    assert said["budget"] == (budget and {"norm": budget.norm, "radius": budget.radius, "unit": budget.unit})


def test_class_says_what_a_table_shows(case):
    cls = type(case.make(0))
    assert cls.source and cls.__doc__.splitlines()[0]
    assert cls.grain in ("sample", "class")


def test_empty_batch_stays_empty(case):
    assert len(case.make(0).apply(part(case.batch, torch.arange(0)))) == 0


def test_pixels_of_another_range_are_refused(case):
    with pytest.raises(ShapeError, match="it takes"):
        case.make(0).apply(case.batch.replace(x=case.batch.x * 255))


# Of the half for classifiers


@pytest.fixture(scope="module", params=KEYED.names())
def make(request):
    made = {}

    def poison(seed=0):
        if seed not in made:
            cls = KEYED.get(request.param)
            made[seed] = cls(make_config(cls, images()), num_classes=CLASSES, image_size=SIZE, seed=seed)
            made[seed].fit([images()])
        return made[seed]

    return poison


def test_delta_keeps_the_declared_budget(make):
    poison = make()
    budget = poison.budget()
    size = norm_of(poison.delta(images()), "linf" if budget is None else budget.norm)
    assert size.max() > 0
    assert budget is None or size.max() <= budget.radius * (1 + 1e-5)


def test_order_and_batches_of_the_data_that_it_was_fitted_to_do_not_matter(make):
    poison = make()
    again = type(poison)(poison.config, num_classes=CLASSES, image_size=SIZE, seed=0)
    again.fit([part(images(), torch.arange(COUNT).flip(0)[:11]), part(images(), torch.arange(COUNT).flip(0)[11:])])
    assert torch.equal(again.apply(images()).x, poison.apply(images()).x)


def test_another_seed_gives_another_pattern_unless_the_data_decides(make):
    poison, other = make(0), make(1)
    assert torch.equal(poison.apply(images()).x, other.apply(images()).x) == (not poison.draws)


def test_grain_says_what_shares_a_pattern(make):
    poison, batch = make(), images()
    grey = batch.replace(x=torch.full_like(batch.x, 0.5))
    delta = poison.delta(grey)
    same_class = torch.equal(delta[0], delta[CLASSES])
    assert same_class == (poison.grain == "class")
    assert not torch.equal(delta[0], delta[1])


def test_ratio_poisons_exactly_the_asked_share_and_leaves_the_rest(make):
    cls, batch = type(make()), images()
    poison = cls(make_config(cls, images()), num_classes=CLASSES, image_size=SIZE, seed=0)
    poison.load_state_dict(make().state_dict())
    ids = sample_ids(batch.keys)
    for ratio, count in ((0.0, 0), (0.3, 7), (0.5, 12), (1.0, COUNT)):
        poison.choose(ids, ratio)
        changed = (poison.apply(batch).x != batch.x).flatten(1).any(1)
        assert int(changed.sum()) == count and torch.equal(changed, poison.chosen(ids))
        some = part(batch, torch.arange(5))
        assert torch.equal((poison.apply(some).x != some.x).flatten(1).any(1), changed[:5])


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_no_share_is_refused(make, ratio):
    with pytest.raises(DataError, match="Give a share of the samples, 0 to 1"):
        make().choose(sample_ids(images().keys), ratio)


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
        ({"x": torch.randn(COUNT, 3, *SIZE)}, ShapeError, "Normalize inside the model"),
        ({"y": torch.full((COUNT,), CLASSES)}, DataError, "labels 4 to 4"),
        ({"y": None}, DataError, "one label per sample"),
        ({"y": torch.zeros(COUNT)}, DataError, "int64"),
        ({"y": torch.zeros(2, dtype=torch.int64)}, DataError, "one label per sample"),
        ({"x": torch.full((COUNT, 3, *SIZE), float("nan"))}, ShapeError, "it takes"),
        ({"x": torch.rand(COUNT, 3, *SIZE).double()}, ShapeError, "float64"),
        ({"x": (torch.rand(COUNT, 3, *SIZE) * 255).to(torch.uint8)}, ShapeError, "uint8"),
    ],
)
def test_unfit_batch_is_refused(make, change, error, words):
    with pytest.raises(error, match=words):
        make().apply(images().replace(**change))

"""Pixels in another memory layout are the same pixels: every poison's `apply` and every defense's `before`."""

import pytest
import torch
from quick_poisons import make_config

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.registry import Registry
from poisonshield.runs.classify import Classify

POISONS = Registry("poisonshield.poisons", kind="poison")
DEFENSES = Classify.defenses_from[0]
CLASSES, SIZE, COUNT = 4, (16, 12), 8


def images():
    levels = torch.randint(0, 256, (COUNT, 3, *SIZE), generator=torch.Generator().manual_seed(0))
    return Batch(tuple(f"k{i}" for i in range(COUNT)), levels / 255, y=torch.arange(COUNT) % CLASSES)


def sliced(x):
    """A view of every second row, column and channel of a larger tensor."""
    return torch.zeros(len(x), 6, 2 * x.shape[2], 2 * x.shape[3])[:, ::2, ::2, ::2].copy_(x)


def turned(x):
    """Height and width swapped in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def strided(x):
    """A view of every second sample."""
    return x.repeat_interleave(2, 0)[::2]


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": sliced,
    "turned": turned,
    "strided": strided,
}


@pytest.fixture(scope="module", params=POISONS.names())
def poison(request):
    cls = POISONS.get(request.param)
    made = cls(make_config(cls, images()), num_classes=CLASSES, image_size=SIZE, seed=0)
    made.fit([images()])
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_poison_gives_the_same_pixels(poison, layout):
    """D: `Convolution.apply` on channels-last pixels raised RuntimeError in a view."""
    batch = images()
    x = LAYOUTS[layout](batch.x)
    assert torch.equal(x, batch.x) and (x.stride() != batch.x.stride())
    before = x.clone()
    assert torch.equal(poison.apply(batch.replace(x=x)).x, poison.apply(batch).x)
    assert torch.equal(x, before)  # and leaves what it was given alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POISONS.names())
def test_every_poison_learns_the_same_from_the_data(name, layout):
    cls, batch = POISONS.get(name), images()
    poisons = [cls(make_config(cls, batch), num_classes=CLASSES, image_size=SIZE, seed=0) for _ in range(2)]
    for poison, x in zip(poisons, (batch.x, LAYOUTS[layout](batch.x)), strict=True):
        poison.fit([batch.replace(x=x)])
    plain, other = (poison.state_dict() for poison in poisons)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DEFENSES.names())
def test_every_defense_gives_the_same_pixels(name, layout):
    cls, batch = DEFENSES.get(name), images()
    defense = cls(cls.Config(), Context(1, CLASSES))
    if defense.looks_first:
        defense.look([batch])
    x = LAYOUTS[layout](batch.x)
    before = x.clone()
    assert torch.equal(defense.before(batch.replace(x=x)).x, defense.before(batch).x)
    assert torch.equal(x, before)

"""OPS: at most one pixel, another for each class, and the one that a search over everything would take."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.errors import ConfigError, PoisonShieldError
from poisonshield.poisons.base import Radius
from poisonshield.poisons.one_pixel import OnePixel


def test_one_pixel_of_one_colour_per_class(cifar10, built):
    poison = built(OnePixel, cifar10)
    released = poison.apply(cifar10).x
    changed = (released != cifar10.x).any(1)  # [B, H, W]
    assert changed.flatten(1).sum(1).max() == 1
    pairs = set()
    for k in range(10):
        where = changed[cifar10.y == k].any(0).nonzero()
        assert len(where) == 1
        colour = released[cifar10.y == k][:, :, where[0, 0], where[0, 1]]
        assert torch.equal(colour.amin(0), colour.amax(0)) and set(colour[0].tolist()) <= {0.0, 1.0}
        pairs.add((*where[0].tolist(), *colour[0].tolist()))
    assert len(pairs) == 10


def test_stump_on_those_pixels_knows_every_class(cifar10, built):
    """A class is told by its pixel having its colour, looked at in the order of how rare the colour is there."""
    poison = built(OnePixel, cifar10)
    released = poison.apply(cifar10).x
    rows, columns = poison.cells[:, 0] // 32, poison.cells[:, 0] % 32
    distance = (released[:, :, rows, columns] - poison.corners[:, 0].T.float()).abs().sum(1)  # [B, K]
    assert (distance[torch.arange(len(cifar10)), cifar10.y] == 0).all()


def brute_force(x, y, num_classes):
    """Every position and colour for every class, straight from the definition, float64 loops."""
    used, chosen = set(), []
    for k in range(num_classes):
        best = (-1.0, None)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                for corner in range(8):
                    colour = [corner >> 2 & 1, corner >> 1 & 1, corner & 1]
                    if (i, j, corner) in used:
                        continue
                    d = torch.tensor([abs(colour[c] - float(v[c, i, j])) for v in x[y == k] for c in range(3)]).double()
                    score = float(d.mean() / d.std(unbiased=False))
                    if score > best[0] + 1e-9:
                        best = (score, (i, j, corner))
        used.add(best[1])
        chosen.append(best[1])
    return chosen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_choice_equals_a_search_over_everything(seed, built):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 256, (24, 3, 6, 6), generator=draw) / 255, torch.arange(24) % 3
    batch = Batch(tuple(str(i) for i in range(24)), x, y=y)
    poison = built(OnePixel, batch, num_classes=3)
    found = [
        (int(c) // 6, int(c) % 6, int(v[0] * 4 + v[1] * 2 + v[2]))
        for c, v in zip(poison.cells[:, 0], poison.corners[:, 0], strict=True)
    ]
    assert found == brute_force(x.double(), y, 3)


def test_batches_of_any_size_give_the_same_choice(mini):
    def fitted(size):
        poison = OnePixel(OnePixel.Config(), num_classes=10, image_size=(32, 32), seed=0)
        parts = torch.arange(len(mini)).split(size)
        poison.fit(Batch(tuple(mini.keys[i] for i in p.tolist()), mini.x[p], y=mini.y[p]) for p in parts)
        return poison.cells, poison.corners

    (cells, corners), (cells_, corners_) = fitted(2000), fitted(77)
    assert torch.equal(cells, cells_) and torch.equal(corners, corners_)


def test_patches_and_several_cells_keep_their_count(mini, built):
    poison = built(OnePixel, mini, patch=5, num_pixels=2)
    changed = (poison.delta(mini) != 0).any(1).flatten(1).sum(1)
    assert poison.budget() == Radius("l0", 50) and changed.max() <= 50 and changed.float().mean() > 40
    assert (poison.cells[:, 0] != poison.cells[:, 1]).all()


def test_cell_of_one_colour_throughout_wins(built):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 3, 4, 4), generator=draw) / 255
    x[:, :, 2, 1] = 0.0
    batch = Batch(tuple(str(i) for i in range(8)), x, y=torch.zeros(8, dtype=torch.int64))
    poison = built(OnePixel, batch, num_classes=1)
    assert int(poison.cells) == 9 and poison.corners.flatten().tolist() == [1, 1, 1]


def test_unfitted_poison_is_refused(mini):
    poison = OnePixel(OnePixel.Config(), num_classes=10, image_size=(32, 32), seed=0)
    with pytest.raises(PoisonShieldError, match=r"call fit\(batches\) before apply"):
        poison.apply(mini)


def test_more_classes_than_pairs_are_refused():
    with pytest.raises(ConfigError, match="4 cells give 32"):
        OnePixel(OnePixel.Config(patch=2), num_classes=40, image_size=(4, 4), seed=0)

"""cutmix, mixup, cutout and ueraser on two ranks: the mean of the ranks' losses is the loss of one process."""

import pytest
import torch
from dist import run_dist
from tiny import tiny_batch, tiny_encoder

from poisonshield.defenses.base import Context
from poisonshield.methods.supervised import Supervised
from poisonshield.runs.classify import Classify

NAMES = ("cutmix", "mixup", "cutout", "ueraser")
SPLITS = ((4, 4), (5, 3))


def losses(rank, world):
    """Of each defense and split, this rank's loss; batch statistics stand still, which are another matter."""
    found = {}
    for name in NAMES:
        for sizes in SPLITS if world > 1 else ((8,),):
            first = sum(sizes[:rank])
            rows = torch.arange(first, first + sizes[rank])
            whole = tiny_batch(8, views=1)
            batch = whole.replace(
                keys=tuple(whole.keys[i] for i in rows.tolist()), x=whole.x[rows], y=whole.y[rows],
                views=(whole.views[0][rows],), rank_sizes=sizes if world > 1 else None,
            )  # fmt: skip
            torch.manual_seed(0)
            method = Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=4)
            cls = Classify.defenses_from[0].get(name)
            defended = cls(cls.Config(), Context(3, 4)).wrap(method).eval()
            found[name, sizes] = defended(batch).loss.item()
    return found


@pytest.mark.dist
def test_losses_do_not_depend_on_ranks():
    alone, two = losses(0, 1), run_dist(losses, 2)
    for name, sizes in two[0]:
        mean = (two[0][name, sizes] + two[1][name, sizes]) / 2
        assert mean == pytest.approx(alone[name, (8,)], rel=1e-5), (name, sizes)

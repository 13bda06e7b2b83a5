"""The whole idea on made-up images, in seconds: a faint tint tells the class, and only VESPR learns the shapes instead.

16 x 16 pixels of noise with one of four strokes somewhere; the poison adds a tint of 4/255 that depends on the class.
A classifier, and self-supervision beside one, that learned from tinted images fail on clean ones; the attack (8/255)
hides the tint.
"""

import pytest
import torch
from tiny import TinyEncoder

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised

CLASSES, TRAIN, TEST, STEPS = 4, 512, 400, 200
TINT = 4 / 255 * torch.tensor([[1.0, 1, -1], [1, -1, 1], [-1, 1, 1], [-1, -1, -1]])


def images(count, seed):
    """Pixels [count, 3, 16, 16] and labels: horizontal, vertical and two diagonal strokes at random places."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    strokes, i = torch.zeros(CLASSES, 8, 8), torch.arange(8)
    strokes[0, 3:5, :], strokes[1, :, 3:5] = 1, 1
    for step in (0, 1):
        strokes[2, i[: 8 - step], i[step:]] = 1
        strokes[3, i[: 8 - step], 7 - i[step:]] = 1
    x = 0.35 + 0.3 * torch.rand(count, 3, 16, 16, generator=draw)
    for n, (top, left) in enumerate(torch.randint(0, 9, (count, 2), generator=draw).tolist()):
        x[n, :, top : top + 8, left : left + 8] += 0.3 * strokes[y[n]]
    return x.clamp(0, 1), y


def build(kind, seed):
    if kind == "supervised":
        return Supervised(Supervised.Config(), encoder=TinyEncoder(), num_classes=CLASSES)
    ssl = SimCLR(SimCLR.Config(hidden=32, out=16), encoder=TinyEncoder(), num_classes=CLASSES)
    views = {"ssl+ce": "none", "vespr": 0}[kind]
    settings = VESPR.Config(eps=8 / 255, attack={"steps": 1, "step_size": 8 / 255}, attack_views=views)
    return VESPR(settings, Context(seed, CLASSES)).wrap(ssl)


def accuracy(kind, seed, *, poisoned=True):
    """Percent on clean test images, after training with shifts and noise as augmentation."""
    x, y = images(TRAIN, seed)
    if poisoned:
        x = (x + TINT[y][:, :, None, None]).clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method = build(kind, seed).train()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        rows = torch.randint(0, TRAIN, (64,), generator=draw)
        views = []
        for _ in range(method.num_views):
            shift = torch.randint(-2, 3, (2,), generator=draw).tolist()
            noise = 0.05 * torch.randn((64, *x.shape[1:]), generator=draw)
            views.append((torch.roll(x[rows], shift, (2, 3)) + noise).clamp(0, 1))
        keys = tuple(str(r) for r in rows.tolist())
        loss = method(Batch(keys, x[rows], tuple(views), y[rows], draw=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test_x, test_y = images(TEST, 1000 + seed)
    with torch.no_grad():
        return 100 * (method.eval().logits(test_x).argmax(1) == test_y).double().mean().item()


@pytest.mark.parametrize("seed", [2])
def test_only_vespr_learns_what_is_real(seed):
    clean = accuracy("supervised", seed, poisoned=False)
    supervised, joint, vespr = (accuracy(kind, seed) for kind in ("supervised", "ssl+ce", "vespr"))
    assert clean > 60 and supervised < 45 and joint < 45
    assert vespr > max(supervised, joint) + 25

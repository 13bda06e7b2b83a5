"""cutout, cutmix, mixup and ueraser against slow loops written from the papers' formulas."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from tiny import tiny_batch, tiny_encoder

from poisonshield.defenses.base import Context
from poisonshield.defenses.cutmix import CutMix
from poisonshield.defenses.cutout import Cutout
from poisonshield.defenses.mixup import Mixup
from poisonshield.defenses.parts.plasma import double, draw_plasma
from poisonshield.defenses.parts.trivial import NAMES, apply_operations
from poisonshield.defenses.ueraser import UEraser
from poisonshield.defenses.vespr import VESPR
from poisonshield.errors import ConfigError
from poisonshield.method import SSLMethod
from poisonshield.methods.simclr import SimCLR
from poisonshield.methods.supervised import Supervised
from poisonshield.random import KeyedRandom


def classifier():
    torch.manual_seed(0)
    return Supervised(Supervised.Config(), encoder=tiny_encoder(), num_classes=4).double().eval()


def wrapped(cls, method=None, **settings):
    return cls(cls.Config(**settings), Context(3, 4)).wrap(method or classifier())


def numbers():
    return tiny_batch(7, views=1, side=8)


def doubled(batch):
    return batch.replace(views=tuple(v.double() for v in batch.views))


def rng_of(batch, scope):
    return batch.random(3).within(scope)


@pytest.mark.parametrize("size", [1, 4, 6, 16])
def test_cutout_blackens_a_square_around_a_uniform_centre_and_nothing_else(size):
    batch = numbers()
    u = rng_of(batch, "CutoutMethod/view0").uniform("centre", 2)
    wanted = batch.views[0].clone()
    for b, (row, column) in enumerate((u * 8).long().tolist()):
        for i in range(8):
            for j in range(8):
                if (
                    row - size // 2 <= i < row - size // 2 + size
                    and column - size // 2 <= j < column - size // 2 + size
                ):
                    wanted[b, :, i, j] = 0
    method = wrapped(Cutout, size=size)
    got = method.change(batch.views[0], rng_of(batch, "CutoutMethod/view0"))
    assert torch.equal(got, wanted)
    loss = method.double()(doubled(batch)).loss
    assert loss == classifier()(batch.replace(views=(wanted.double(),))).loss


def test_cutout_of_half_the_side_by_default():
    white = torch.ones(400, 3, 32, 32)
    covered = wrapped(Cutout).change(white, KeyedRandom(0, torch.arange(400)))[:, 0] == 0
    assert covered.flatten(1).sum(1).max() == 256
    assert 8 * 8 <= covered.flatten(1).sum(1).min()  # centres lie inside, so at least a quarter shows
    assert covered.float().mean(0).std() < 0.1


def pairs_by_hand(batch):
    """Whom each sample meets, and its two numbers: whoever drew the next larger lot."""
    rng = rng_of(batch, "mixing/view0")
    lots = rng.uniform("lot", 1)[:, 0].tolist()
    ranked = sorted(range(len(lots)), key=lots.__getitem__)
    partner = {a: ranked[(i + 1) % len(ranked)] for i, a in enumerate(ranked)}
    return [partner[i] for i in range(len(lots))], rng.uniform("share and whether", 2), rng


def soft_loss(method, views, targets):
    """Cross-entropy with soft labels, from its definition."""
    log_p = method.logits(views).log_softmax(1)
    return -(targets * log_p).sum(1).mean()


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_mixup_is_soft_label_cross_entropy_on_blends(p):
    batch = numbers()
    partner, drawn, _ = pairs_by_hand(batch)
    views, targets = [], []
    for i, other in enumerate(partner):
        share = float(drawn[i, 0]) if drawn[i, 1] < p else 1.0
        x, z = batch.views[0][i].double(), batch.views[0][other].double()
        views.append(share * x + (1 - share) * z)
        one = F.one_hot(batch.y, 4).double()
        targets.append(share * one[i] + (1 - share) * one[other])
    wanted = soft_loss(classifier(), torch.stack(views), torch.stack(targets))
    got = wrapped(Mixup, p=p)(doubled(batch)).loss
    torch.testing.assert_close(got, wanted, rtol=1e-7 if p else 1e-12, atol=1e-7)
    if p == 0:
        torch.testing.assert_close(got, classifier()(doubled(batch)).loss)


def test_cutmix_is_soft_label_cross_entropy_by_counted_area():
    batch = numbers()
    partner, drawn, rng = pairs_by_hand(batch)
    centre, side = rng.uniform("centre", 2), 8
    views, targets, one = [], [], F.one_hot(batch.y, 4).double()
    for i, other in enumerate(partner):
        cut = int(float((1 - drawn[i, 0]).sqrt()) * side)
        row, column = int(centre[i, 0] * side), int(centre[i, 1] * side)
        top, bottom = max(row - cut // 2, 0), min(row + cut // 2, side)
        left, right = max(column - cut // 2, 0), min(column + cut // 2, side)
        x = batch.views[0][i].double().clone()
        x[:, top:bottom, left:right] = batch.views[0][other].double()[:, top:bottom, left:right]
        own = 1 - max(bottom - top, 0) * max(right - left, 0) / side**2
        views.append(x)
        targets.append(own * one[i] + (1 - own) * one[other])
    wanted = soft_loss(classifier(), torch.stack(views), torch.stack(targets))
    torch.testing.assert_close(wrapped(CutMix)(doubled(batch)).loss, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", [Mixup, CutMix, UEraser])
def test_a_step_with_more_in_it_is_refused_and_told_the_order(cls):
    torch.manual_seed(0)
    ssl = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4)
    with pytest.raises(ConfigError, match="needs labels and a classifier"):
        wrapped(cls, ssl)
    with pytest.raises(ConfigError, match=f"List {cls.name} first"):
        wrapped(cls, wrapped(VESPR, copy.deepcopy(ssl)))
    with pytest.raises(ConfigError, match=f"List {cls.name} first"):
        wrapped(cls, wrapped(Cutout))


@pytest.mark.parametrize("variant, epoch, copies", [("lite", 0, 1), ("std", 49, 5), ("std", 50, 1), ("max", 99, 5)])
def test_ueraser_takes_the_worst_copy_of_each_picture(variant, epoch, copies):
    batch = numbers().replace(epoch=epoch)
    method = wrapped(UEraser, variant=variant).float()
    made = [method.augment(batch.views[0], rng_of(batch, f"ueraser/view0/copy{r}")) for r in range(copies)]
    worst = []
    for i, label in enumerate(batch.y.tolist()):
        each = [-method.method.logits(m[i : i + 1]).log_softmax(1)[0, label].item() for m in made]
        worst.append(max(each))
    assert method(batch).loss.item() == pytest.approx(sum(worst) / len(worst), rel=1e-5)
    assert all(m.min() >= 0 and m.max() <= 1 for m in made)
    other = method.augment(
        batch.views[0][2:3], batch.replace(keys=batch.keys[2:3]).random(3).within("ueraser/view0/copy0")
    )
    torch.testing.assert_close(other, made[0][2:3])


def test_plasma_follows_the_diamond_square_rule():
    draw = torch.Generator().manual_seed(0)
    grid, fresh = torch.rand(1, 1, 3, 3, generator=draw).double(), torch.rand(1, 1, 5, 5, generator=draw).double()
    s = 0.3
    wanted = np.zeros((5, 5))
    wanted[::2, ::2] = grid[0, 0]
    for i in (1, 3):
        for j in (1, 3):
            near = [wanted[i + a, j + b] for a in (-1, 1) for b in (-1, 1)]
            wanted[i, j] = (1 - s) * np.mean(near) + s * fresh[0, 0, i, j]
    for i in range(5):
        for j in range(5):
            if (i + j) % 2:
                near = [(i + a, j + b) for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))]
                mean = np.mean([wanted[p] for p in near if min(p) >= 0 and max(p) < 5])
                wanted[i, j] = (1 - s) * mean + s * fresh[0, 0, i, j]
    np.testing.assert_allclose(double(grid, fresh, torch.full((1, 1, 1, 1), s).double())[0, 0], wanted)
    cloud = draw_plasma(KeyedRandom(0, torch.arange(3)), (3, 9, 14), torch.tensor([0.3, 0.5, 0.7]), "x")
    assert cloud.shape == (3, 3, 9, 14) and cloud.amin((2, 3)).eq(0).all() and cloud.amax((2, 3)).eq(1).all()


@pytest.mark.parametrize(
    "name, strength, theirs",
    [
        ("auto_contrast", 0.0, tv.autocontrast),
        ("equalize", 0.0, tv.equalize),
        ("posterize", 3.4, lambda x: tv.posterize(x, 3)),
        ("solarize", 0.4, lambda x: tv.solarize(x, 102)),
        ("contrast", 1.7, lambda x: tv.adjust_brightness(x, 1.7)),  # kornia's contrast is torchvision's brightness
        ("brightness", 1.2, lambda x: (x.int() + 51).clamp(0, 255)),
        ("sharpness", 1.8, lambda x: tv.adjust_sharpness(x / 255, 1.8) * 255),
        ("rotate", 20.0, lambda x: tv.rotate(x / 255, 20.0, BILINEAR) * 255),
        (
            "shear_x",
            0.25,
            lambda x: tv.affine(x / 255, 0, [0, 0], 1.0, [-math.degrees(math.atan(0.25)), 0], BILINEAR) * 255,
        ),
        (
            "shear_y",
            -0.2,
            lambda x: tv.affine(x / 255, 0, [0, 0], 1.0, [0, math.degrees(math.atan(0.2))], BILINEAR) * 255,
        ),
        ("translate_x", 0.25, lambda x: tv.affine(x, 0, [4, 0], 1.0, [0, 0])),
        ("translate_y", -0.25, lambda x: tv.affine(x, 0, [0, -3], 1.0, [0, 0])),
    ],
)
def test_each_operation_of_trivial_augment_is_torchvisions(name, strength, theirs):
    levels = torch.randint(20, 230, (2, 3, 12, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    which = torch.tensor([NAMES.index(name), NAMES.index(name)])
    ours = apply_operations(levels / 255, which, torch.full((2,), strength)) * 255
    assert (ours - theirs(levels).float()).abs().max() <= 1.01


BILINEAR = tv.InterpolationMode.BILINEAR


def test_every_step_of_the_published_name_is_the_plain_forward():
    assert Supervised.forward is SSLMethod.forward  # what plain_classifier relies on

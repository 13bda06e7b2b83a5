"""pil and tue_csd: their gradients against autograd and finite differences, and what they are good for."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from poisonshield.batch import Batch
from poisonshield.poisons.learned import progress as progress_file
from poisonshield.poisons.pil import PIL
from poisonshield.poisons.tue_csd import TUECSD, measure_csd

CLASSES, SIDE = 3, 6


def images(count=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw) / 255
    return Batch(tuple(f"k{i}" for i in range(count)), x, y=torch.arange(count) % CLASSES)


def make(cls, **settings):
    return cls(cls.Config(**settings), num_classes=CLASSES, image_size=(SIDE, SIDE), seed=0)


def test_pil_steps_are_those_of_its_loss_by_autograd_in_float64():
    batch, draw = images(), torch.Generator().manual_seed(1)
    x, y = batch.x.double(), batch.y
    w = torch.randn(CLASSES, 3 * SIDE**2, generator=draw, dtype=torch.float64) * 0.3
    noise = wanted = torch.empty_like(x).uniform_(-8 / 255, 8 / 255, generator=draw)
    for _ in range(6):
        leaf = wanted.clone().requires_grad_()
        p = ((x - leaf).flatten(1) @ w.T).softmax(1)
        kl = (torch.log(torch.tensor(1 / CLASSES)) - p.log()).mean(1)  # sum over k of 1/K (log 1/K - log p_k)
        loss = 0.9 * F.cross_entropy(leaf.flatten(1) @ w.T, y, reduction="none") + 0.1 * kl
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        wanted = (wanted - 0.8 / 255 * grad.sign()).clamp(-8 / 255, 8 / 255)
    got = make(PIL, steps=6).descend(w, x, y, noise)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_pil_releases_the_picture_minus_its_noise_which_blinds_the_classifier():
    batch, poison = images(), make(PIL, batch_size=20)
    kept = poison._train_linear
    weights = []
    poison._train_linear = lambda pictures: weights.append(kept(pictures)) or weights[0]
    poison.fit([batch])
    delta, w = poison.delta(batch), weights[0]
    assert ((-delta).flatten(1) @ w.T).argmax(1).eq(batch.y).float().mean() > 0.95  # the noise that is subtracted
    clean, poisoned = (x.flatten(1) @ w.T for x in (batch.x, batch.x + delta))
    own = lambda scores: scores.softmax(1)[torch.arange(60), batch.y].mean()
    assert own(poisoned) < own(clean)


def csd_by_hand(delta, y):
    """Straight from the formula, a pair of classes at a time, both ways round."""
    centre = {k: delta[y == k].flatten(1).mean(0) for k in set(y.tolist())}
    spread = {k: (delta[y == k].flatten(1) - c).square().sum(1).sqrt().mean() for k, c in centre.items()}
    pairs = list(itertools.permutations(centre, 2))
    each = [(spread[i] + spread[j] + 1e-5) / ((centre[i] - centre[j]).square().sum().sqrt() + 1e-5) for i, j in pairs]
    return sum(each) / len(pairs)


def test_csd_is_the_formula_and_its_gradient_that_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(7, 3, 2, 2, generator=draw, dtype=torch.float64) * 0.03
    y = torch.tensor([0, 2, 2, 0, 5, 5, 5])  # some classes are not there
    assert measure_csd(delta, y, through_spread=True).item() == pytest.approx(csd_by_hand(delta, y).item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda d: measure_csd(d, y, through_spread=True), (delta.requires_grad_(),))


def test_spread_is_a_constant_to_the_gradient_unless_asked():
    delta, y = images(12).x.double().requires_grad_(), images(12).y
    spread = {k: (delta[y == k] - delta[y == k].mean(0)).flatten(1).norm(dim=1).mean().detach() for k in range(3)}
    centre = torch.stack([delta[y == k].mean(0).flatten() for k in range(3)])
    loss = sum(
        (spread[i] + spread[j] + 1e-5) / ((centre[i] - centre[j]).norm() + 1e-5)
        for i, j in itertools.combinations(range(3), 2)
    )
    (wanted,) = torch.autograd.grad(loss / 3, delta)
    (got,) = torch.autograd.grad(measure_csd(delta, y, through_spread=False), delta)
    torch.testing.assert_close(got, wanted)


def test_tue_csd_makes_noise_that_the_nearest_class_mean_tells_apart(tmp_path, monkeypatch):
    batch, poison = images(), make(TUECSD, epochs=4, batch_size=30)
    poison.fit([batch])
    delta = poison.delta(batch).flatten(1).double()
    means = torch.stack([delta[batch.y == k].mean(0) for k in range(CLASSES)])
    assert torch.cdist(delta, means).argmin(1).eq(batch.y).all()
    start = make(TUECSD, epochs=1, steps=1, batch_size=30)
    start.fit([batch])
    csd = [measure_csd(p.delta(batch), batch.y, through_spread=True) for p in (poison, start)]
    assert csd[0] < 0.5 * csd[1]
    # Stopped after two passes it goes on to the same noise.
    monkeypatch.setattr(progress_file.Progress, "due", lambda self: True)
    kept = progress_file.Progress.save

    def save(self, place, tensors):
        kept(self, place, tensors)
        if place["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress_file.Progress, "save", save)
    again = make(TUECSD, epochs=4, batch_size=30)
    again.work_in(tmp_path, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        again.fit([batch])
    again.fit([batch])
    assert torch.equal(again.table, poison.table)

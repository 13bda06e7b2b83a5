"""gray, blur, the published no-op and orthoproj: against Pillow, the identity, and a hand-written fit."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_batch

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.blur import Blur
from poisonshield.defenses.gaussian import Gaussian
from poisonshield.defenses.gaussian_published import GaussianPublished
from poisonshield.defenses.gray import Gray
from poisonshield.defenses.orthoproj import OrthoProj
from poisonshield.errors import DataError, PoisonShieldError, ShapeError
from poisonshield.poisons.class_noise import ClassNoise
from poisonshield.random import philox_uniform, philox_words, sample_ids, stream_of
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import Classify
from poisonshield.runs.parts.image_data import build_training_set, open_data


def levels(count=40, side=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, side, side), generator=draw) / 255
    return Batch(tuple(f"s{i}" for i in range(count)), x, y=torch.arange(count) % 4)


def test_gray_is_pillows_luma_on_every_level():
    ramp = torch.stack(torch.meshgrid(*[torch.arange(0, 256, 5)] * 3, indexing="ij"))  # [3, 52, 52, 52]
    pixels = ramp.reshape(3, 52, -1).to(torch.uint8)
    after = Gray(None).before(Batch(("a",), pixels[None] / 255)).x[0]
    wanted = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(after, (torch.from_numpy(wanted.copy()) / 255).expand(3, -1, -1))


def test_blur_is_the_gaussian_of_one_pixel():
    batch = levels()
    blur, gaussian = Blur(Blur.Config()), Gaussian(Gaussian.Config(sigma=1.0))
    assert torch.equal(blur.before(batch).x, gaussian.before(batch).x)
    assert not torch.equal(blur.before(batch).x, batch.x)


def test_the_published_gaussian_changes_no_picture():
    batch = levels()
    assert torch.equal(GaussianPublished(None).before(batch).x, batch.x)
    assert not GaussianPublished.purifier


def by_hand(batch, *, epochs, batch_size, lr, seed=3):
    """The linear softmax by autograd in float64, in the order that the keys' lots give."""
    ids = sample_ids(batch.keys)
    rows = ids.argsort()
    x, y, ids = batch.x[rows].flatten(1).double(), batch.y[rows], ids[rows]
    u = philox_uniform((4, x.shape[1]), seed, stream=stream_of("orthoproj weights")).double()
    w = ((2 * u - 1) / x.shape[1] ** 0.5).requires_grad_()
    for epoch in range(epochs):
        rate = lr * (0.1 if epoch >= epochs / 2 else 1) * (0.1 if epoch >= 0.75 * epochs else 1)
        lots = philox_words(1, seed=seed, ids=ids, offset=epoch, stream=stream_of("orthoproj order"))[:, 0]
        order = lots.argsort(stable=True)
        for at in range(0, len(x), batch_size):
            part = order[at : at + batch_size]
            loss = torch.nn.functional.cross_entropy(x[part] @ w.T, y[part])
            (grad,) = torch.autograd.grad(loss, w)
            w = (w - rate * grad).detach().requires_grad_()
    return w.detach()


def fitted(batch, **settings):
    defense = OrthoProj(OrthoProj.Config(**settings), Context(3, 4))
    defense.look([batch])
    return defense


def test_orthoproj_projects_onto_what_the_fitted_weights_do_not_span():
    batch, settings = levels(), {"epochs": 6, "batch_size": 16, "lr": 0.1}
    w = by_hand(batch, **settings)
    x = batch.x.flatten(1).double()
    wanted = x - x @ torch.linalg.pinv(w) @ w  # least squares, without any basis
    out = fitted(batch, **settings).before(batch).x.flatten(1)
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=0)
    assert (out.double() @ w.T).abs().max() < 1e-4
    assert out.min() < 0 or out.max() > 1  # not clipped


def test_orthoproj_does_not_depend_on_the_order_of_the_data():
    batch, order = levels(), torch.arange(39, -1, -1)
    parts = [order[:11], order[11:]]
    shuffled = [Batch(tuple(batch.keys[i] for i in p), batch.x[p], y=batch.y[p]) for p in parts]
    other = OrthoProj(OrthoProj.Config(epochs=2), Context(3, 4))
    other.look(shuffled)
    assert torch.equal(other.before(batch).x, fitted(batch, epochs=2).before(batch).x)


def class_gap(x, y):
    """How far the class means lie apart, beside how far samples of one class do."""
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    return (means - means.mean(0)).square().sum().sqrt()


def test_orthoproj_removes_class_wise_noise():
    batch = levels(400)
    grey = batch.replace(x=torch.full_like(batch.x, 0.5) + 0.02 * (batch.x - 0.5))
    poison = ClassNoise(ClassNoise.Config(), num_classes=4, image_size=(8, 8), seed=0)
    poisoned = poison.apply(grey)
    after = fitted(poisoned, epochs=40, batch_size=64, lr=0.5).before(poisoned)
    before = class_gap(poisoned.x - grey.x, batch.y)
    assert class_gap(after.x, batch.y) < 0.5 * before


def test_orthoproj_refuses_what_it_cannot_fit_in_words():
    defense = OrthoProj(OrthoProj.Config(), Context(3, 4))
    with pytest.raises(PoisonShieldError, match="before it saw the training set"):
        defense.before(tiny_batch())
    with pytest.raises(DataError, match="no training picture"):
        defense.look([])
    with pytest.raises(ShapeError, match="of one size"):
        defense.look([levels(), levels(side=6)])
    with pytest.raises(ShapeError, match="Resize"):
        fitted(levels(), epochs=1).before(levels(side=6))


def test_a_run_shows_orthoproj_its_poisoned_pictures_as_earlier_defenses_leave_them():
    run = read_experiment(
        "defend/orthoproj_cifar10_mini", ["defenses=[gray, {name: orthoproj, epochs: 1}]", "data.verify=once"]
    )
    data = open_data(run)
    training = build_training_set(run, data)
    batch = next(iter(training.batches(64, torch.device("cpu"))))
    projected = batch.x.flatten(1)
    gray = Gray(None).before(Batch(batch.keys, training.source.read(torch.arange(64)) / 255)).x.flatten(1)
    assert not torch.equal(projected, gray)
    gone = torch.linalg.matrix_rank(gray - projected, tol=1e-3)
    assert 1 <= int(gone) <= 10
    assert Classify.defenses_from[0].get("orthoproj") is OrthoProj

"""Contrastive poisoning: its loss and steps against loops in float64, views with gradient, and going on to the bit."""

import pytest
import torch

from poisonshield.batch import Batch
from poisonshield.poisons.cp import CP
from poisonshield.poisons.learned import progress as progress_file
from poisonshield.poisons.learned.contrast import Contrast, ContrastConfig, draw_view
from poisonshield.random import KeyedRandom

SIDE, CPU = 8, torch.device("cpu")
SMALL = {
    "model": {"name": "resnet_mini", "stem_stride": 2, "widths": (4, 4, 8, 8)},
    "batch_size": 10, "lr": 0.05, "head": {"projector": "byol", "hidden": 8, "out": 6},
}  # fmt: skip


def images(count=20):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw) / 255
    return Batch(tuple(f"k{i}" for i in range(count)), x, y=torch.arange(count) % 4)


def make(**settings):
    config = CP.Config(**{"surrogate": SMALL, "epochs": 3, **settings})
    return CP(config, num_classes=4, image_size=(SIDE, SIDE), seed=0)


def network():
    return Contrast(ContrastConfig(**SMALL), num_classes=4, seed=0, device=CPU).double().eval()


def loss_by_hand(net, x, rng):
    """NT-Xent over both views, a sample and a view at a time."""
    z = [net.projector(net.encoder(draw_view(x, rng.within(f"view{i}")))) for i in range(2)]
    z = [v / v.norm(dim=1, keepdim=True).clamp_min(1e-12) for v in z]
    total = 0
    for i, j in ((0, 1), (1, 0)):
        for n in range(len(x)):
            others = [z[j][k] for k in range(len(x))] + [z[i][k] for k in range(len(x)) if k != n]
            below = sum(torch.exp(z[i][n] @ other / 0.5) for other in others)
            total = total - torch.log(torch.exp(z[i][n] @ z[j][n] / 0.5) / below)
    return total / (2 * len(x))


@pytest.mark.parametrize("per", ["sample", "class"])
def test_a_step_is_the_sign_of_the_losss_gradient_through_both_views_in_float64(per):
    batch, net = images(), network()
    x, y, rng = batch.x.double(), batch.y, KeyedRandom(0, torch.arange(20))
    draw = torch.Generator().manual_seed(1)
    noise = torch.empty((4, 3, SIDE, SIDE), dtype=torch.float64).uniform_(-8 / 255, 8 / 255, generator=draw)
    noise = (x + noise[y]).clamp(0, 1) - x if per == "sample" else noise
    leaf = noise.clone().requires_grad_()
    shown = torch.stack([x[i] + leaf[i if per == "sample" else y[i]] for i in range(20)]).clamp(0, 1)
    (grad,) = torch.autograd.grad(loss_by_hand(net, shown, rng), leaf)
    wanted = (noise - 0.8 / 255 * grad.sign()).clamp(-8 / 255, 8 / 255)
    wanted = (x + wanted).clamp(0, 1) - x if per == "sample" else wanted
    got = make(per=per).improve(net, x, noise, rng, None if per == "sample" else y)
    firm = grad.abs() > 1e-9 * grad.abs().max()  # a smaller one's sign turns with the order of additions
    torch.testing.assert_close(got[firm], wanted[firm], rtol=0, atol=1e-12)
    assert firm.double().mean() > 0.5  # the rest lies outside both crops


def test_views_stay_in_range_and_depend_on_the_key_alone():
    x, rng = images().x, KeyedRandom(0, torch.arange(20))
    views = draw_view(x, rng)
    assert views.shape == x.shape and views.min() >= 0 and views.max() <= 1
    torch.testing.assert_close(draw_view(x[3:5], KeyedRandom(0, torch.arange(3, 5))), views[3:5])


def test_noise_makes_the_loss_small():
    batch, poison, net = images(), make(per="sample", epochs=1, steps=1), network()
    x, rng = batch.x.double(), KeyedRandom(0, torch.arange(20))
    delta = torch.zeros_like(x)
    with torch.no_grad():
        before = net.loss(x, rng)
    for _ in range(10):
        delta = poison.improve(net, x, delta, rng)
    with torch.no_grad():
        assert net.loss((x + delta).clamp(0, 1), rng) < before
    assert delta.abs().max() <= 8 / 255 + 1e-12


@pytest.mark.parametrize("per", ["sample", "class"])
def test_a_stopped_training_goes_on_to_the_bit(per, tmp_path, monkeypatch):
    batch, whole = images(), make(per=per)
    whole.fit([batch])
    assert whole.table.abs().max() == 8 and len(whole.table) == (20 if per == "sample" else 4)
    monkeypatch.setattr(progress_file.Progress, "due", lambda self: True)
    kept = progress_file.Progress.save

    def save(self, place, tensors):
        kept(self, place, tensors)
        if place["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress_file.Progress, "save", save)
    again = make(per=per)
    again.work_in(tmp_path, CPU)
    with pytest.raises(KeyboardInterrupt):
        again.fit([batch])
    again.fit([batch])
    assert torch.equal(again.table, whole.table)


def test_the_rate_rises_then_falls_to_nothing():
    poison = make(epochs=100)
    assert [round(poison.rate(e), 3) for e in (1, 10, 55, 100)] == [0.1, 1.0, 0.5, 0.0]
    assert make(epochs=1).rate(0.5) == pytest.approx(0.5)

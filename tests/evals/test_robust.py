"""Restarts and the loss of the attack on robust accuracy; a joint model is read from its class scores."""

import pytest
import torch
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.evals.robust import robust
from poisonshield.method import Method
from poisonshield.methods.simclr import SimCLR


def vespr(classes=4):
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=classes)
    return VESPR(VESPR.Config(), Context(0, classes)).wrap(method)


class Needle(Method):
    """Wrong only where the first pixel lies in a narrow slot, and flat elsewhere: found by luck of the start alone."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Flatten()

    def loss(self, features, batch):
        raise NotImplementedError

    def logits(self, x):
        inside = ((x[:, 0, 0, 0] - 0.5).abs() < 0.01).float()
        return torch.stack([1 - 2 * inside, torch.zeros_like(inside)], 1) + 0 * x.flatten(1)[:, :1]


def test_a_sample_is_right_only_if_it_withstands_every_restart():
    x = torch.full((200, 3, 2, 2), 0.5)
    x[:, 0, 0, 0] = 0.45
    batch = Batch(tuple(f"s{i}" for i in range(200)), x, y=torch.zeros(200, dtype=torch.long))
    settings = {"eps": 0.1, "steps": 1, "step_size": 0.0, "seed": 0}
    # Each start hits the slot with chance 0.02 / 0.2, so about 0.9^r of 200 samples are left after r restarts.
    for restarts in (1, 5):
        share = robust(Needle(), [batch], restarts=restarts, **settings) / 100
        spread = (0.9**restarts * (1 - 0.9**restarts) / 200) ** 0.5
        assert share == pytest.approx(0.9**restarts, abs=4 * spread)


@pytest.mark.parametrize("loss", ["ce", "logit"])
def test_restarts_never_help_the_model(loss):
    batches = [tiny_batch(60, seed=s) for s in (0, 1)]
    settings = {"eps": 2 / 255, "steps": 2, "step_size": 1 / 255, "seed": 3, "loss": loss}
    values = [robust(vespr(), batches, restarts=r, **settings) for r in (1, 3, 6)]
    assert values == sorted(values, reverse=True)


def test_a_joint_model_is_read_from_logits_not_features():
    """8 features, 4 classes, and labels that follow the clean scores: the accuracy without attack is 100."""
    method, batch = vespr().eval(), tiny_batch(40)
    with torch.no_grad():
        method.head.bias.copy_(-method.head.weight @ method.encoder(batch.x).mean(0))  # all classes get predicted
    batch = batch.replace(y=method.logits(batch.x).argmax(1), views=None)
    features_say = (method.encoder(batch.x).argmax(1) == batch.y).double().mean().item()
    assert features_say < 0.9
    settings = {"steps": 3, "step_size": 0.02, "seed": 0}
    assert robust(method, [batch], eps=0.0, **settings) == 100.0
    assert robust(method, [batch], eps=0.1, **settings) < 100.0


def test_all_samples_unless_told_and_the_same_again():
    method, batch = vespr().eval(), tiny_batch(40)
    batch = batch.replace(y=method.logits(batch.x).argmax(1), views=None)
    settings = {"eps": 4 / 255, "steps": 2, "step_size": 2 / 255, "seed": 0, "restarts": 2}
    assert robust(method, [batch], **settings) == robust(method, [batch], max_samples=40, **settings)
    first = batch.replace(keys=batch.keys[:7], x=batch.x[:7], y=batch.y[:7])
    assert robust(method, [batch], max_samples=7, **settings) == robust(method, [first], **settings)


def test_logit_attack_lowers_the_true_score_whatever_the_others_do():
    method, batch = vespr().eval(), tiny_batch(30)
    seen = []
    original = type(method).logits

    class Spy(type(method)):
        def logits(self, x):
            seen.append(x.detach())
            return original(self, x)

    method.__class__ = Spy
    robust(method, [batch], eps=0.05, steps=5, step_size=0.02, seed=0, loss="logit")
    with torch.no_grad():
        before, after = (original(method, v).gather(1, batch.y[:, None]) for v in (batch.x, seen[-1]))
    assert (after < before).float().mean() > 0.9

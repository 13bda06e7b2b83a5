"""The attack on robust accuracy, its restarts and its loss; a joint model is read from its class scores."""

import pytest
import torch
from tiny import tiny_batch, tiny_encoder
from torch import nn

from poisonshield.attacks import APGD, FGSM, PGD, Linf, budget
from poisonshield.batch import Batch
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.evals.base import Subject
from poisonshield.evals.robust import Robust, robust
from poisonshield.method import Method
from poisonshield.methods.simclr import SimCLR


def vespr(classes=4):
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=classes)
    return VESPR(VESPR.Config(), Context(0, classes)).wrap(method)


def right_without_attack(*batches):
    """The joint model, and the batches with the labels that it gives them: all classes are predicted."""
    method = vespr().eval()
    with torch.no_grad():
        method.head.bias.copy_(-method.head.weight @ method.encoder(batches[0].x).mean(0))
        return method, [batch.replace(y=method.logits(batch.x).argmax(1), views=None) for batch in batches]


class Samples:
    """Test images alone."""

    def __init__(self, batches):
        self.batches = batches

    def test(self, count=None):
        return iter(self.batches)


def measured(**settings):
    """What the evaluation of these settings gives for 120 samples that are all right without attack."""
    method, batches = right_without_attack(*(tiny_batch(60, seed=s) for s in (0, 1)))
    return Robust(Robust.Config(**settings))(Subject(method, Samples(batches), 4, seed=3))["robust_top1"]


def test_default_attack_gives_the_numbers_that_it_always_gave():
    """Recorded before the attack could be chosen, when it was PGD of 10 steps of 1/255 within 4/255."""
    assert measured() == 47.5
    assert measured(loss="logit") == pytest.approx(100 * 64 / 120)
    assert measured(eps=8 / 255, attack={"step_size": 2 / 255}) == pytest.approx(100 * 20 / 120)


@pytest.mark.parametrize("norm, eps", [("linf", 2 / 255), ("linf", 4 / 255), ("l2", 0.15)])
def test_apgd_is_no_weaker_than_pgd_of_as_many_steps(norm, eps):
    pgd = measured(norm=norm, eps=eps, attack={"steps": 20, "step_size": eps / 4})
    assert measured(norm=norm, eps=eps, attack={"name": "apgd", "steps": 20}) <= pgd < 100


class Passing(Method):
    """Three classes, of which the first is right except where the first pixel lies near 0.6; the loss rises to 1."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Flatten()

    def logits(self, x):
        v = x[:, 0, 0, 0]
        second = torch.where(v < 0.5, 12.04 * v - 6, 0.06 - 0.08 * v)
        return torch.stack([0 * v, second, 5.9 * v - 6], 1)


class Blind(APGD):
    """APGD that cannot be told what the classifier gets wrong."""

    options = ()


def test_an_attack_that_takes_success_remembers_a_wrong_point_that_it_passes():
    batch = Batch(tuple(f"s{i}" for i in range(200)), torch.full((200, 3, 1, 1), 0.5), y=torch.zeros(200).long())
    passed, end = (robust(Passing(), [batch], attack(steps=5), Linf(0.5), seed=0) for attack in (APGD, Blind))
    assert end == 100.0 and passed == pytest.approx(75, abs=15)  # a quarter of the random starts is wrong


@pytest.mark.parametrize("norm", FGSM.norms)
def test_attack_that_takes_no_success_works_in_every_norm(norm):
    method, batches = right_without_attack(tiny_batch(60))
    assert robust(method, batches, FGSM(), budget(norm, 0.0), seed=0) == 100.0
    assert robust(method, batches, FGSM(), budget(norm, {"linf": 0.1, "l2": 1.0, "l1": 8.0}[norm]), seed=0) < 100.0


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
    # Each start hits the slot with chance 0.02 / 0.2, so about 0.9^r of 200 samples are left after r restarts.
    for restarts in (1, 5):
        attack = PGD(steps=1, step_size=0.0, restarts=restarts)
        share = robust(Needle(), [batch], attack, Linf(0.1), seed=0) / 100
        spread = (0.9**restarts * (1 - 0.9**restarts) / 200) ** 0.5
        assert share == pytest.approx(0.9**restarts, abs=4 * spread)


@pytest.mark.parametrize("loss", ["ce", "logit"])
def test_restarts_never_help_the_model(loss):
    batches = [tiny_batch(60, seed=s) for s in (0, 1)]
    attacks = [PGD(steps=2, step_size=1 / 255, restarts=r) for r in (1, 3, 6)]
    values = [robust(vespr(), batches, attack, Linf(2 / 255), seed=3, loss=loss) for attack in attacks]
    assert values == sorted(values, reverse=True)


def test_a_joint_model_is_read_from_logits_not_features():
    """8 features, 4 classes, and labels that follow the clean scores: the accuracy without attack is 100."""
    method, (batch,) = right_without_attack(tiny_batch(40))
    features_say = (method.encoder(batch.x).argmax(1) == batch.y).double().mean().item()
    assert features_say < 0.9
    attack = PGD(steps=3, step_size=0.02)
    assert robust(method, [batch], attack, Linf(0.0), seed=0) == 100.0
    assert robust(method, [batch], attack, Linf(0.1), seed=0) < 100.0


def test_all_samples_unless_told_and_the_same_again():
    method, batch = vespr().eval(), tiny_batch(40)
    batch = batch.replace(y=method.logits(batch.x).argmax(1), views=None)
    attack = PGD(steps=2, step_size=2 / 255, restarts=2)

    def value(batch, **more):
        return robust(method, [batch], attack, Linf(4 / 255), seed=0, **more)

    assert value(batch) == value(batch, max_samples=40)
    first = batch.replace(keys=batch.keys[:7], x=batch.x[:7], y=batch.y[:7])
    assert value(batch, max_samples=7) == value(first)


def test_logit_attack_lowers_the_true_score_whatever_the_others_do():
    method, batch = vespr().eval(), tiny_batch(30)
    seen = []
    original = type(method).logits

    class Spy(type(method)):
        def logits(self, x):
            seen.append(x.detach())
            return original(self, x)

    method.__class__ = Spy
    robust(method, [batch], PGD(steps=5, step_size=0.02), Linf(0.05), seed=0, loss="logit")
    with torch.no_grad():
        before, after = (original(method, v).gather(1, batch.y[:, None]) for v in (batch.x, seen[-1]))
    assert (after < before).float().mean() > 0.9

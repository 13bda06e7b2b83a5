"""Pair metrics against loops in float64, and what counts as a pair."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_encoder

from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.errors import DataError
from poisonshield.evals.pairs import pairs
from poisonshield.methods.simclr import SimCLR


def vespr():
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4)
    return VESPR(VESPR.Config(), Context(0, 4)).wrap(method)


def poisoned(batch, untouched=(2,)):
    delta = 8 / 255 * (2 * torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(5)) - 1)
    delta[list(untouched)] = 0
    return batch.replace(x=(batch.x + delta).clamp(0, 1))


def slow(method, clean, poison, chosen):
    """Python floats, one sample at a time, in float64."""
    method = method.double().eval()
    sums = {}
    for i in chosen:
        x, x_p = clean.x[i : i + 1].double(), poison.x[i : i + 1].double()
        with torch.no_grad():
            h, h_p = method.encoder(x)[0].tolist(), method.encoder(x_p)[0].tolist()
            scores, scores_p = method.logits(x)[0].tolist(), method.logits(x_p)[0].tolist()
        length, length_p = math.sqrt(sum(v * v for v in h)), math.sqrt(sum(v * v for v in h_p))
        distance = max(abs(v) for v in (x - x_p).flatten().tolist())
        y = int(clean.y[i])
        ce = math.log(sum(math.exp(s) for s in scores)) - scores[y]
        ce_p = math.log(sum(math.exp(s) for s in scores_p)) - scores_p[y]
        values = {
            "psn_local_lip": sum(abs(p - q) for p, q in zip(h, h_p, strict=True)) / distance,
            "psn_local_lip_unit": sum(abs(p / length - q / length_p) for p, q in zip(h, h_p, strict=True)) / distance,
            "psn_cln_sim": sum(p * q for p, q in zip(h, h_p, strict=True)) / (length * length_p),
            "ce_clean": ce,
            "ce_poisoned": ce_p,
            "ce_gap": ce - ce_p,
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / len(chosen)
    return sums


def test_every_measure_of_a_joint_model_equals_a_loop_over_poisoned_samples():
    clean = tiny_batch()
    poison = poisoned(clean)
    ours = pairs(vespr(), [clean], [poison])
    assert ours.pop("pairs") == 5  # sample 2 was left clean
    theirs = slow(vespr(), clean, poison, [0, 1, 3, 4, 5])
    assert ours.keys() == theirs.keys()
    for name in theirs:  # float32 features; distances of 8/255 magnify their rounding 32 times
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name


def test_batches_are_pooled_by_sample():
    a, b = tiny_batch(6, seed=0), tiny_batch(2, seed=1)
    clean, poison = [a, b], [poisoned(a), poisoned(b, ())]
    ours = pairs(vespr(), clean, poison)
    each = [pairs(vespr(), [c], [p]) for c, p in zip(clean, poison, strict=True)]
    assert ours["pairs"] == 7
    assert ours["psn_cln_sim"] == pytest.approx((5 * each[0]["psn_cln_sim"] + 2 * each[1]["psn_cln_sim"]) / 7)


def test_without_a_classifier_there_is_no_gap_and_without_poison_nothing():
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4)
    out = pairs(method, [tiny_batch()], [poisoned(tiny_batch())])
    assert out["ce_gap"] is None and out["psn_cln_sim"] < 1
    out = pairs(method, [tiny_batch()], [tiny_batch()])
    assert out.pop("pairs") == 0 and set(out.values()) == {None}


def test_a_gap_is_positive_where_the_poison_tells_the_label():
    method, clean = vespr(), tiny_batch()
    x = clean.x.clone().requires_grad_()
    method.eval()
    torch.nn.functional.cross_entropy(method.logits(x), clean.y).backward()
    helped = clean.replace(x=(clean.x - 8 / 255 * x.grad.sign()).clamp(0, 1))
    assert pairs(method, [clean], [helped])["ce_gap"] > 0


def test_other_samples_are_refused():
    a = tiny_batch()
    other = a.replace(keys=tuple(f"t{i}" for i in range(6)))
    for streams in ([a], [other]), ([a], []), ([a], [a, a]):
        with pytest.raises(DataError, match="different samples"):
            pairs(vespr(), *streams)


def test_nothing_of_the_model_changes():
    method = vespr().train()
    state = {k: v.clone() for k, v in method.state_dict().items()}
    pairs(method, [tiny_batch()], [poisoned(tiny_batch())])
    assert method.training and all(torch.equal(v, state[k]) for k, v in method.state_dict().items())

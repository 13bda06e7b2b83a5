"""Recovery, clean cost and their intervals, on numbers whose answers are known."""

import json

import numpy
import pytest
import torch

from poisonshield.errors import DataError
from poisonshield.evals.diffusion.parts.recovery import by_group, clean_cost, mean_with_interval, recovery


def table(values):
    return {f"c{i}": float(v) for i, v in enumerate(values)}


CLEAN, POISONED, DEFENDED = table([0.9, 0.8, 1.0, 0.7]), table([0.2, 0.1, 0.1, 0.0]), table([0.7, 0.6, 0.9, 0.6])


def test_recovery_is_the_share_of_the_damage_that_comes_back():
    told = recovery(CLEAN, POISONED, DEFENDED)
    assert told["status"] == "ok"
    assert told["value"] == pytest.approx((2.8 - 0.4) / (3.4 - 0.4))
    assert told["low"] <= told["value"] <= told["high"]
    assert recovery(CLEAN, POISONED, CLEAN)["value"] == pytest.approx(1)
    assert recovery(CLEAN, POISONED, POISONED)["value"] == pytest.approx(0)
    json.dumps(told)


def test_recovery_does_not_depend_on_the_metrics_sign():
    told = recovery(*({k: 5 - v for k, v in t.items()} for t in (CLEAN, POISONED, DEFENDED)))
    assert told["value"] == pytest.approx(0.8)


def test_where_the_poison_did_nothing_recovery_is_undefined():
    told = recovery(table([0.5, 0.6, 0.4, 0.5]), table([0.4, 0.7, 0.5, 0.4]), table([0.9] * 4))
    assert told["status"] == "undefined" and "value" not in told
    assert told["damage"]["low"] <= 0 <= told["damage"]["high"]
    alone = recovery(table([0.9]), table([0.1]), table([0.9]))
    assert alone["status"] == "undefined" and "at least 2" in alone["why"]


def test_the_interval_is_that_of_a_slow_bootstrap():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)).tolist()
    told = mean_with_interval(table(values), draws=20_000)
    dice = numpy.random.default_rng(1)
    means = [numpy.mean(dice.choice(values, 12)) for _ in range(20_000)]
    assert told["value"] == pytest.approx(numpy.mean(values))
    assert told["low"] == pytest.approx(numpy.percentile(means, 2.5), abs=0.03)
    assert told["high"] == pytest.approx(numpy.percentile(means, 97.5), abs=0.03)
    assert told == mean_with_interval(table(values), draws=20_000)
    one = mean_with_interval(table([3.0]))
    assert one == {"value": 3.0, "low": None, "high": None, "concepts": 1}


def test_intervals_pair_the_conditions_of_a_concept():
    """Concepts differ a lot, and the defense takes 0.1 off each: the interval of the cost is narrow."""
    clean = table([0.1, 0.9, 0.3, 0.7])
    told = clean_cost(clean, {k: v - 0.1 for k, v in clean.items()})
    assert told["value"] == pytest.approx(0.1)
    assert told["high"] - told["low"] < 1e-9
    distance = clean_cost(clean, {k: v + 0.1 for k, v in clean.items()}, higher_is_better=False)
    assert distance["value"] == pytest.approx(0.1)


def test_conditions_of_other_concepts_are_refused():
    with pytest.raises(DataError, match="each concept"):
        recovery(CLEAN, POISONED, table([1.0]))
    with pytest.raises(DataError, match="at least one"):
        mean_with_interval({})


def test_groups_are_split_and_the_ungrouped_stay_in_all():
    groups = {"c0": "id", "c1": "od", "c2": "id", "c3": None, "gone": "none of these"}
    split = by_group(CLEAN, groups)
    assert split == {"all": CLEAN, "id": {"c0": 0.9, "c2": 1.0}, "od": {"c1": 0.8}}

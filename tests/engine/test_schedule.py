"""Learning rates against the numbers of the authors' code, torch's own schedulers and formulas written out."""

import math

import pytest
import torch
from pydantic import ValidationError

from poisonshield.engine.schedule import ScheduleConfig, lr_at


def rates(config, *, total, lr=1.0, steps_per_epoch=1, decay=True):
    run = {"lr": lr, "total_steps": total, "steps_per_epoch": steps_per_epoch, "decay": decay}
    return [lr_at(config, step=s, **run) for s in range(total)]


def torch_rates(make, *, total, lr):
    """The rate that one of torch's schedulers has for each of `total` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, out = make(optimizer), []
    for step in range(total):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return out


def test_cosine_after_warmup_is_that_of_the_vespr_code():
    """Per epoch, 200 epochs, warm-up 10, peak 0.25; the last of 7 steps of an epoch has the rate of the first."""
    config = ScheduleConfig(warmup_epochs=10, per_epoch=True)
    per_step = rates(config, total=200 * 7, lr=0.25, steps_per_epoch=7)
    known = {1: 0.025, 5: 0.125, 9: 0.225, 10: 0.248753, 11: 0.248461, 50: 0.214766, 101: 0.125, 150: 0.038011}
    known[200] = 1.5e-5
    for epoch, value in known.items():
        assert per_step[(epoch - 1) * 7] == per_step[epoch * 7 - 1] == pytest.approx(value, abs=6e-7)


def test_drops_after_warmup_are_those_of_the_linear_probe():
    """100 epochs of 3 steps; 5.0 per 256 samples at 512, warm-up of 10 epochs, then times 0.2 at 60, 75 and 90."""
    config = ScheduleConfig(name="step", warmup_epochs=10, per_epoch=True)
    epochs = [float(e) for e in range(1, 10)] + [10.0] * 50 + [2.0] * 15 + [0.4] * 15 + [0.08] * 11
    per_step = rates(config, total=300, lr=10.0, steps_per_epoch=3)
    assert per_step == pytest.approx([rate for rate in epochs for _ in range(3)])


@pytest.mark.parametrize("name", ["cosine", "step", "constant"])
def test_rate_without_decay_stays_at_the_peak_after_warmup(name):
    """At the epoch where warm-up ends, cosine has begun to fall (0.248753) and the predictor's rate has not."""
    config = ScheduleConfig(name=name, warmup_epochs=10, per_epoch=True)
    expected = [0.25 * e / 10 for e in range(1, 10)] + [0.25] * 191
    assert rates(config, total=200, lr=0.25, decay=False) == pytest.approx(expected)


def test_one_cycle_without_decay_rises_as_it_does_and_stays():
    config = ScheduleConfig(name="one_cycle")
    usual, kept = rates(config, total=50), rates(config, total=50, decay=False)
    top = usual.index(max(usual))
    assert kept[: top + 1] == usual[: top + 1] and kept[top:] == pytest.approx([1.0] * (50 - top))


@pytest.mark.parametrize("total", [20, 47, 100])
@pytest.mark.parametrize(("warmup", "start", "final"), [(0.3, 0.04, 0.0), (0.1, 0.1, 0.01), (0.5, 1.0, 0.5)])
def test_one_cycle_is_that_of_torch(total, warmup, start, final):
    config = ScheduleConfig(name="one_cycle", warmup_fraction=warmup, start_fraction=start, final_fraction=final)
    settings = {"div_factor": 1 / start, "final_div_factor": start / final if final else math.inf, "pct_start": warmup}
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=total, cycle_momentum=False, **settings),
        total=total,
        lr=0.5,
    )
    assert rates(config, total=total, lr=0.5) == pytest.approx(theirs, abs=1e-12)


def test_one_cycle_warms_up_for_three_tenths_unless_told():
    assert rates(ScheduleConfig(name="one_cycle"), total=50) == rates(
        ScheduleConfig(name="one_cycle", warmup_fraction=0.3), total=50
    )


def test_cosine_without_warmup_is_that_of_torch():
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.02), total=40, lr=0.2
    )
    assert rates(ScheduleConfig(final_fraction=0.1), total=40, lr=0.2) == pytest.approx(theirs, abs=1e-12)


def test_constant_is_constant_after_warmup():
    assert rates(ScheduleConfig(name="constant", warmup_steps=4), total=6, lr=2.0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_drops_fall_where_a_loop_puts_them():
    config = ScheduleConfig(name="step", milestones=(0.25, 0.5), gamma=0.1)
    expected, rate = [], 3.0
    for tick in range(1, 21):
        if tick in (5, 10):
            rate *= 0.1
        expected.append(rate)
    assert rates(config, total=20, lr=3.0) == pytest.approx(expected)


def test_drop_is_not_shifted_by_rounding_of_its_fraction():
    """0.29 * 100 is 28.999999999999996 and 0.07 * 100 is 7.000000000000001 in floating point."""
    epochs = rates(ScheduleConfig(name="step", milestones=(0.07, 0.29), gamma=0.5), total=100)
    assert [epochs[t - 1] for t in (6, 7, 28, 29)] == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 6}, {"warmup_epochs": 2}, {"warmup_fraction": 0.2}], ids=lambda w: next(iter(w))
)
def test_each_way_to_say_warmup_says_the_same(warmup):
    expected = [tick / 6 if tick < 6 else 1.0 for tick in range(1, 31)]
    assert rates(ScheduleConfig(name="constant", **warmup), total=30, steps_per_epoch=3) == pytest.approx(expected)


def test_last_epoch_may_be_cut_short():
    """8 steps of 3 an epoch are 3 epochs, the last of 2 steps."""
    expected = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert rates(ScheduleConfig(per_epoch=True), total=8, steps_per_epoch=3) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "step", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_shortest_runs_have_a_rate_between_zero_and_the_peak(name, total):
    assert all(0 <= rate <= 1 for rate in rates(ScheduleConfig(name=name), total=total))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_steps": 1, "warmup_epochs": 1}, "warmup_steps and warmup_epochs both say"),
        ({"warmup_steps": 1, "per_epoch": True}, "use warmup_epochs or warmup_fraction"),
        ({"milestones": (0.9, 0.5)}, "rising fractions"),
        ({"milestones": (0.5, 1.0)}, "rising fractions"),
        ({"milestones": (60, 75)}, "rising fractions"),
        ({"warmup_fraction": 1.0}, "less than 1"),
        ({"gamma": 0.0}, "greater than 0"),
        ({"name": "linear"}, "'cosine', 'one_cycle', 'step' or 'constant'"),
        ({"warm_up_steps": 3}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        ScheduleConfig(**settings)

"""A demo takes as many steps as the machine has time for, all of them where it can, and says so."""

import itertools

import pytest
import torch
from torch import nn

from poisonshield.api import demo, demo_szt
from poisonshield.api.stories import LEAST, RESERVE, Cost, choose_length, time_step
from poisonshield.batch import Batch, StepOutput

COST = Cost(steps=600, training=1500, rest=300, seconds=180)


class Clocked(nn.Module):
    """A method whose n-th step takes the n-th of some times on a clock of its own."""

    def __init__(self, times):
        super().__init__()
        self.weight, self.times, self.now = nn.Parameter(torch.ones(())), iter(times), 0.0

    def forward(self, batch):
        self.now += next(self.times)
        return StepOutput(self.weight * 1)


def timed(*times):
    method = Clocked(times)
    return time_step(method, Batch(("a",)), clock=lambda: method.now)


def test_a_quick_machine_does_every_step_and_changes_no_setting():
    length = choose_length(COST, 0.1)
    assert (length.steps, length.overrides, length.warning) == (600, [], "")
    assert length.told == "This machine: 10.0 steps a second; 600 steps a story."


@pytest.mark.parametrize("seconds_a_step", [0.101, 0.15, 0.2, 0.3])
def test_a_slow_machine_does_fewer_within_the_time_and_says_so(seconds_a_step):
    length = choose_length(COST, seconds_a_step)
    assert LEAST * 600 < length.steps < 600 and length.overrides == [f"engine.max_steps={length.steps}"]
    needed = seconds_a_step * (COST.rest + COST.training * length.steps / 600)
    assert needed <= (1 - RESERVE) * 180 < needed + seconds_a_step * COST.training / 600
    assert f"{length.steps} of 600 steps a story" in length.told
    assert f"Shortened to {length.steps} of 600 steps" in length.warning


def test_a_very_slow_machine_still_does_a_tenth():
    assert choose_length(COST, 5.0).steps == 60


def test_first_step_and_rare_slow_ones_do_not_count():
    assert timed(9.0, *itertools.repeat(0.1, 7), 0.5, *itertools.repeat(0.1, 9)) == pytest.approx(0.1)


def test_a_second_of_steps_is_timed_and_at_least_four():
    assert timed(1.0, *itertools.repeat(0.25, 4)) == pytest.approx(0.25)
    assert timed(1.0, *itertools.repeat(8.0, 4)) == pytest.approx(8.0)


@pytest.mark.parametrize("part", [demo, demo_szt], ids=["vespr", "szt"])
def test_both_parts_time_steps_of_their_own_network(part, monkeypatch):
    """The two cost under 5 minutes together; a step of each is one of its config's method."""
    seen = []
    monkeypatch.setattr(part, "time_step", lambda method, batch: seen.append((method(batch).loss, batch)) or 0.01)
    assert part.fit_to_machine().overrides == []
    ((loss, batch),) = seen
    assert loss.isfinite() and loss.requires_grad
    assert demo.COST.seconds + demo_szt.COST.seconds < 300

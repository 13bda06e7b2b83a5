"""A loss or gradient that is not finite: nothing moves, and the run stops or goes on as it was told to."""

import logging
import math

import pytest
import torch
from torch import nn

from engine.tiny import (
    Interrupted,
    TinyMethod,
    TinyStream,
    by_hand,
    difference,
    losses,
    make_trainer,
    same_bits,
    train,
    weights,
)
from poisonshield.batch import StepOutput
from poisonshield.engine.guards import FiniteGuard, NonFiniteError
from poisonshield.engine.processes import processes
from poisonshield.engine.schedule import ScheduleConfig, lr_at
from poisonshield.engine.settings import EngineConfig

KEYS = tuple(f"k{i}" for i in range(6))
FINE, BAD = torch.tensor(1.5), {value: torch.tensor(float(value)) for value in ("nan", "inf", "-inf")}


class BadGradient(TinyMethod):
    """The loss of step 4 is finite and its gradient is not: 0 * infinity, the slope of a root at zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        out = super().forward(batch)
        zero = 0 * self.head.bias.sum()
        self.steps += 1
        return StepOutput(out.loss + (zero.abs().sqrt() if self.steps == 4 else zero), out.metrics)


def start(folder, method_class=TinyMethod, **settings):
    """The trainer after its run, and what fit returned or the NonFiniteError that ended it."""
    with processes(EngineConfig(max_steps=1, device="cpu"), seed=1):
        trainer = make_trainer(folder, method=method_class(), **settings)
        try:
            return trainer, trainer.fit()
        except NonFiniteError as error:
            return trainer, error


def moved_by_a_step(trainer):
    """A copy of the parameters, of what after_step keeps, and of the momenta."""
    state = {n: p.detach().clone() for n, p in trainer.method.named_parameters()}
    momenta = {str(i): s["momentum_buffer"].clone() for i, s in enumerate(trainer.backend.optimizer.state.values())}
    return {**state, "average": trainer.method.average.clone(), **momenta}


@pytest.mark.parametrize("stop", [False, True])
def test_finite_step_passes_and_carries_the_stop_flag(stop):
    assert FiniteGuard("stop", 1).judge(0, FINE, FINE, KEYS, stop=stop) == (True, stop, False, False)


def test_ctrl_c_and_the_clock_ride_along():
    told = {"stop": True, "interrupted": True, "save": True}
    assert FiniteGuard("stop", 1).judge(0, FINE, FINE, KEYS, **told) == (True, True, True, True)
    assert FiniteGuard("stop", 1).judge(0, FINE, FINE, KEYS, stop=False, save=True) == (True, False, False, True)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_bad_value_is_named_with_step_rank_and_samples(value, where):
    loss, norm = (BAD[value], FINE) if where == "loss" else (FINE, BAD[value])
    with pytest.raises(NonFiniteError) as error:
        FiniteGuard("stop", 10).judge(7, loss, norm, KEYS, stop=False)
    expected = f"step 8: loss {loss.item()}, gradient norm {norm.item()} on rank 0 of 1, samples k0, k1, k2, k3, ...."
    assert str(error.value).startswith(expected) and "optimizer.clip_norm" in str(error.value)
    assert isinstance(error.value, FloatingPointError)


def test_few_samples_are_named_without_dots():
    with pytest.raises(NonFiniteError, match=r"samples k0, k1\.\n"):
        FiniteGuard("stop", 10).judge(0, BAD["nan"], FINE, KEYS[:2], stop=False)


def test_bad_steps_are_dropped_up_to_the_limit(caplog):
    guard = FiniteGuard("skip", 2)
    with caplog.at_level(logging.WARNING, "poisonshield"):
        verdicts = [guard.judge(s, BAD["nan"], FINE, KEYS, stop=s == 1) for s in range(2)]
    assert [verdict[:2] for verdict in verdicts] == [(False, False), (False, True)]
    assert ["1 of at most 2" in caplog.messages[0], "2 of at most 2" in caplog.messages[1]] == [True, True]
    assert guard.judge(2, FINE, FINE, KEYS, stop=False).finite
    with pytest.raises(NonFiniteError, match="after 2 dropped steps"):
        guard.judge(3, BAD["nan"], FINE, KEYS, stop=False)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_step_stops_the_run_before_anything_moves(tmp_path, what):
    before = {}
    stream = Interrupted(3, lambda: before.update(moved_by_a_step(trainer)), bad_steps=(3,) if what == "loss" else ())
    with processes(EngineConfig(max_steps=1, device="cpu"), seed=1):
        trainer = make_trainer(tmp_path, method=TinyMethod() if what == "loss" else BadGradient(), stream=stream)
        with pytest.raises(NonFiniteError, match="^step 4: "):
            trainer.fit()
    assert len(before) == 6 + 1 + 6 and same_bits(before, moved_by_a_step(trainer))
    assert len(losses(tmp_path)) == 3 and not (tmp_path / "checkpoints").exists()


def test_dropped_steps_leave_no_trace_in_weights_or_buffers(tmp_path):
    """As a loop that steps back over bad batches; batch statistics would be nan for ever if they were kept."""
    bad = (0, 4, 5)
    trainer, _ = train(tmp_path, stream=TinyStream(bad), nonfinite="skip", nonfinite_limit=3)
    schedule = ScheduleConfig(warmup_steps=3)
    rates = [lr_at(schedule, lr=0.1, step=s, total_steps=15, steps_per_epoch=6) for s in range(15)]
    assert difference(weights(trainer.method), weights(by_hand(rates, bad_steps=bad))) < 1e-6
    assert trainer.method.encoder[1].num_batches_tracked == 12 and trainer.guard.skipped == 3
    assert len(losses(tmp_path)) == 12 and all(math.isfinite(loss) for loss in losses(tmp_path))


def test_gradient_alone_is_reason_enough_to_drop_a_step(tmp_path):
    trainer, _ = train(tmp_path, method_class=BadGradient, max_steps=6, nonfinite="skip", nonfinite_limit=3)
    # The buffer that counts steps is put back with the others, so step 4 is tried at every later step.
    assert trainer.guard.skipped == 3 and trainer.method.steps == 3
    assert all(v.isfinite().all() for v in weights(trainer.method).values())


def test_one_dropped_step_too_many_ends_the_run(tmp_path):
    trainer, error = start(tmp_path, stream=TinyStream((1, 2, 6)), nonfinite="skip", nonfinite_limit=2)
    assert isinstance(error, NonFiniteError) and "step 7" in str(error) and "after 2 dropped steps" in str(error)
    assert trainer.step == 6 and all(p.isfinite().all() for p in trainer.method.parameters())


def test_dropped_steps_are_counted_over_a_resume(tmp_path):
    start(tmp_path, stream=TinyStream((1, 2)), nonfinite="skip", nonfinite_limit=2, max_steps=5)
    again = {"stream": TinyStream((6,)), "nonfinite": "skip", "nonfinite_limit": 2, "max_steps": 9, "resume": "auto"}
    trainer, error = start(tmp_path, **again)
    assert isinstance(error, NonFiniteError) and trainer.step == 6


def test_average_over_a_log_interval_leaves_dropped_steps_out(tmp_path):
    train(tmp_path / "all", stream=TinyStream((1,)), nonfinite="skip", max_steps=4)
    train(tmp_path / "mean", stream=TinyStream((1,)), nonfinite="skip", max_steps=4, log_every_steps=4)
    each = losses(tmp_path / "all")
    assert len(each) == 3 and losses(tmp_path / "mean") == pytest.approx([sum(each) / 3])


def test_interval_of_dropped_steps_only_writes_no_line(tmp_path):
    train(tmp_path, stream=TinyStream((2, 3)), nonfinite="skip", max_steps=6, log_every_steps=2)
    assert len(losses(tmp_path)) == 2


def test_frozen_parameters_stay_and_do_not_disturb_the_step(tmp_path):
    class Frozen(TinyMethod):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, 4).requires_grad_(False)

    trainer, _ = train(tmp_path, method_class=Frozen, max_steps=2, clip_norm=None)
    torch.manual_seed(1)
    assert trainer.step == 2 and same_bits(weights(trainer.method.teacher), weights(Frozen().teacher))

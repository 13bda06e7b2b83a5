"""A verdict that is read one step later than it is given: from the bad step on nothing moves, and the run ends."""

import os
import signal

import pytest
import torch
from dist import run_dist

from engine.tiny import (
    Interrupted,
    TinyMethod,
    TinyStream,
    losses,
    make_trainer,
    same_bits,
    train,
    weights,
)
from poisonshield.engine.guards import FiniteGuard, NonFiniteError
from poisonshield.engine.processes import processes
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.signals import Preempted

KEYS, FINE, NAN = ("k0", "k1"), torch.tensor(1.5), torch.tensor(float("nan"))


class Plainest(TinyMethod):
    """Without an after_step of its own."""

    after_step = TinyMethod.__mro__[1].after_step


def late_trainer(folder, **settings):
    """A trainer whose guard is late on the CPU too."""
    torch.manual_seed(1)
    trainer = make_trainer(folder, method=Plainest(), fused_optimizer=True, **settings)
    trainer.judges_late = True
    return trainer


@pytest.fixture(autouse=True)
def one_process():
    with processes(EngineConfig(max_steps=1, device="cpu"), seed=1):
        yield


def test_verdict_comes_with_the_next_step_and_names_its_own():
    guard = FiniteGuard("stop", 1, late=True)
    assert guard.judge(0, FINE, FINE, KEYS, stop=False) == (True, False, False, False)
    assert guard.judge(1, NAN, FINE, KEYS, stop=True, save=True).finite and guard.broken == 1
    with pytest.raises(NonFiniteError, match=r"^step 2: loss nan, gradient norm 1.5 on rank 0 of 1, samples k0, k1\."):
        guard.judge(2, FINE, FINE, ("other",), stop=False)
    assert guard.broken == 1  # a finite step after it does not set things in motion again


def test_what_ranks_were_told_comes_late_too():
    guard = FiniteGuard("stop", 1, late=True)
    assert guard.judge(0, FINE, FINE, KEYS, stop=True) == (True, False, False, False)
    assert guard.judge(1, FINE, FINE, KEYS, stop=False, save=True) == (True, True, False, False)
    assert guard.settle() == (True, False, False, True) and guard.settle() == (True, False, False, False)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nothing_moves_from_the_bad_step_on(tmp_path, optimizer):
    before, after = {}, {}
    stream = Interrupted(3, lambda: before.update(weights_of(trainer)), bad_steps=(3,))
    trainer = late_trainer(tmp_path, stream=stream, optimizer=optimizer, log_every_steps=100)
    with pytest.raises(NonFiniteError, match="^step 4: loss nan"):
        trainer.fit()
    after.update(weights_of(trainer))
    assert before and same_bits(before, after) and trainer.step == 4
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


def weights_of(trainer):
    """A copy of the parameters and of all that the optimiser keeps in their shape."""
    state = trainer.backend.optimizer.state
    kept = {f"{i}{k}": v.clone() for i, s in enumerate(state.values()) for k, v in s.items() if k != "step"}
    return {**{n: p.detach().clone() for n, p in trainer.method.named_parameters()}, **kept}


@pytest.mark.parametrize("settings", [{"log_every_steps": 4}, {"checkpoint_every_steps": 4, "log_every_steps": 100}])
def test_nothing_is_written_of_a_bad_step(tmp_path, settings):
    trainer = late_trainer(tmp_path, stream=TinyStream((3,)), **settings)
    with pytest.raises(NonFiniteError, match="^step 4: "):
        trainer.fit()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_late_run_is_the_run_of_an_early_guard(tmp_path):
    late = late_trainer(tmp_path / "late")
    late.fit()
    early, _ = train(tmp_path / "early", method_class=Plainest, fused_optimizer=True)
    assert same_bits(weights(late.method), weights(early.method))
    assert losses(tmp_path / "late") == losses(tmp_path / "early")


def test_a_run_that_is_told_to_stop_saves_one_step_later_and_goes_on_alike(tmp_path):
    stream = Interrupted(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        late_trainer(tmp_path / "cut", stream=stream).fit()
    again = late_trainer(tmp_path / "cut", resume="auto")
    again.fit()
    whole = late_trainer(tmp_path / "whole")
    whole.fit()
    assert same_bits(weights(again.method), weights(whole.method))


def test_method_that_moves_something_itself_is_judged_at_once(tmp_path):
    trainer = make_trainer(tmp_path, method=TinyMethod(), fused_optimizer=True, max_steps=1)
    trainer.judges_late = True
    trainer.fit()
    assert not trainer.guard.late


def test_fused_optimizer_takes_the_same_steps_and_either_checkpoint(tmp_path):
    found = []
    for name, fused in (("plain", False), ("fused", True)):
        train(tmp_path / name, method_class=Plainest, optimizer="adamw", fused_optimizer=fused, max_steps=4)
        for then in (False, True):
            folder, settings = tmp_path / f"{name}-{then}", {"fused_optimizer": then, "resume": str(tmp_path / name)}
            train(folder, method_class=Plainest, optimizer="adamw", **settings)
            found.append(losses(tmp_path / name) + losses(folder))
    assert len(found[0]) == 15 and all(other == pytest.approx(found[0], rel=1e-5) for other in found)


def test_arithmetic_of_a_gpu_is_set_and_put_back():
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    for tf32 in (True, False):
        with processes(EngineConfig(max_steps=1, device="cpu", cudnn_benchmark=True, tf32=tf32), seed=1):
            assert (cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == (True, tf32, tf32)
    assert (cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == before


def judge_on_ranks(rank, world):
    """Rank 1 has a bad loss in the second of three steps, and is told to stop in the first."""
    guard, said = FiniteGuard("stop", 1, late=True), []
    for step in range(3):
        loss = NAN if (rank, step) == (1, 1) else FINE
        try:
            verdict = guard.judge(step, loss, FINE, (f"r{rank}s{step}",), stop=(rank, step) == (1, 0))
            said.append((verdict.stop, guard.broken.item()))
        except NonFiniteError as error:
            said.append(str(error).splitlines()[0])
    return said


def test_all_ranks_stop_together_and_name_the_rank_of_the_step_before():
    what = "step 2: loss nan, gradient norm 1.5 on rank 1 of 2, samples r1s1."
    assert run_dist(judge_on_ranks, 2) == [[(False, 0.0), (True, 1.0), what]] * 2

"""Told to stop, a run saves itself at the next step boundary, ends with exit code 75, and goes on as if nothing was."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.tiny import Interrupted, losses, same_bits, train, weights
from poisonshield.engine.signals import PREEMPTED_EXIT_CODE, Preempted, StopSignals

ROOT = Path(__file__).resolve().parents[2]
BOTH = [signal.SIGTERM, signal.SIGUSR1]

RUN = """
import sys, time
from pathlib import Path
from engine.tiny import Interrupted, train

stream = Interrupted(4, lambda: (print("step 5", flush=True), time.sleep(0.5)))
train(Path(sys.argv[1]), stream=stream, checkpoint_every_steps=3, resume="auto")
"""


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and losses of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer, _ = train(folder)
    return weights(trainer.method), losses(folder)


@pytest.mark.parametrize("number", BOTH, ids=lambda n: n.name)
@pytest.mark.parametrize("at", [0, 5, 13])
def test_run_saves_itself_and_resumed_equals_an_uninterrupted_one(tmp_path, uninterrupted, number, at):
    with pytest.raises(Preempted) as stopped:
        train(tmp_path, stream=Interrupted(at, send(number)))
    assert (stopped.value.code, stopped.value.step) == (75, at + 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{at + 1:08d}"]
    trainer, _ = train(tmp_path, resume="auto")
    assert same_bits(weights(trainer.method), uninterrupted[0]) and losses(tmp_path) == uninterrupted[1]


def test_signal_in_the_last_step_lets_the_run_end_well(tmp_path, uninterrupted):
    trainer, done = train(tmp_path, stream=Interrupted(14, send(signal.SIGTERM)))
    assert done["steps"] == 15 and same_bits(weights(trainer.method), uninterrupted[0])


def test_killed_process_ends_with_75_and_leaves_a_run_to_go_on_with(tmp_path, uninterrupted):
    """A process of its own, told to stop while it waits for data."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "step 5\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED_EXIT_CODE == 75, errors
    assert "SIGTERM received: saving at the next step boundary" in errors
    trainer, _ = train(tmp_path, resume="auto")
    assert same_bits(weights(trainer.method), uninterrupted[0]) and losses(tmp_path) == uninterrupted[1]


def test_second_sigterm_kills_at_once():
    code = """
import os, signal
from poisonshield.engine.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.caught, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n")


@pytest.mark.parametrize("number", BOTH, ids=lambda n: n.name)
def test_handlers_are_put_back(number):
    before = {n: signal.getsignal(n) for n in BOTH}
    with StopSignals() as signals:
        assert not signals.caught
        os.kill(os.getpid(), number)
        assert signals.caught
        if number == signal.SIGUSR1:
            os.kill(os.getpid(), number)  # a second one is no reason to die
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is (number == signal.SIGTERM)
    assert {n: signal.getsignal(n) for n in BOTH} == before


def test_handlers_are_put_back_when_a_run_fails(tmp_path):
    before = {n: signal.getsignal(n) for n in BOTH}
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, stream=Interrupted(2, lambda: 1 / 0))
    assert {n: signal.getsignal(n) for n in BOTH} == before


def test_outside_the_main_thread_a_run_goes_without(tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(train(tmp_path, max_steps=2)[1]["steps"]))
    thread.start()
    thread.join(timeout=60)
    assert steps == [2]

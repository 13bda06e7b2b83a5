"""Told to stop, a run saves itself at the next step boundary, ends with 75 or 130, and goes on as if nothing was."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.tiny import Interrupted, losses, same_bits, train, weights
from poisonshield.engine.signals import Preempted, StopSignals

ROOT = Path(__file__).resolve().parents[2]
ALL = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]

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


@pytest.mark.parametrize("number", ALL, ids=lambda n: n.name)
@pytest.mark.parametrize("at", [0, 5, 13])
def test_run_saves_itself_and_resumed_equals_an_uninterrupted_one(tmp_path, uninterrupted, number, at):
    with pytest.raises(Preempted) as stopped:
        train(tmp_path, stream=Interrupted(at, send(number)))
    assert (stopped.value.code, stopped.value.step) == (130 if number == signal.SIGINT else 75, at + 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{at + 1:08d}"]
    trainer, _ = train(tmp_path, resume="auto")
    assert same_bits(weights(trainer.method), uninterrupted[0]) and losses(tmp_path) == uninterrupted[1]


def test_signal_in_the_last_step_lets_the_run_end_well(tmp_path, uninterrupted):
    trainer, done = train(tmp_path, stream=Interrupted(14, send(signal.SIGTERM)))
    assert done["steps"] == 15 and same_bits(weights(trainer.method), uninterrupted[0])


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 75, "SIGTERM received"), (signal.SIGINT, 130, "Ctrl-C")],
    ids=["TERM", "Ctrl-C"],
)
def test_process_that_is_told_to_stop_leaves_a_run_to_go_on_with(tmp_path, uninterrupted, number, code, said):
    """faults B: Ctrl-C, nothing saved. A process of its own, told to stop while it waits for data."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "step 5\n"
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"{said}: saving at the next step boundary" in errors
    trainer, _ = train(tmp_path, resume="auto")
    assert same_bits(weights(trainer.method), uninterrupted[0]) and losses(tmp_path) == uninterrupted[1]


TWICE = """
import os, signal, sys, time
from poisonshield.engine.signals import StopSignals
number, pause = signal.Signals(int(sys.argv[1])), float(sys.argv[2])
with StopSignals() as signals:
    os.kill(os.getpid(), number)
    print(signals.caught, signals.interrupted, flush=True)
    time.sleep(pause)
    os.kill(os.getpid(), number)
    print("still here")
"""


@pytest.mark.parametrize(
    ("number", "pause", "ends"),
    [(signal.SIGTERM, 0.6, False), (signal.SIGUSR1, 0.6, False), (signal.SIGINT, 0.6, True), (signal.SIGINT, 0, False)],
    ids=["TERM", "USR1", "Ctrl-C", "one Ctrl-C that comes twice"],
)
def test_only_a_second_ctrl_c_ends_a_run_that_is_saving(number, pause, ends):
    """Schedulers send TERM to all and again; a launcher passes on the Ctrl-C that the terminal sent to all."""
    command = [sys.executable, "-c", TWICE, str(int(number)), str(pause)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    first = f"True {number == signal.SIGINT}\n"
    assert (done.returncode, done.stdout) == ((-number, first) if ends else (0, first + "still here\n"))
    assert done.stderr.count("saving at the next step boundary") == 1


LEAVING = """
import atexit, os, signal
from poisonshield.engine.signals import Preempted, StopSignals
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))  # runs last: registered first
with StopSignals():
    try:
        with StopSignals():
            raise Preempted(3)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_process_that_has_saved_ends_with_75_whatever_it_is_sent_then():
    """Slurm sends TERM to the others as soon as one process of a step has ended, and they were ending too."""
    done = subprocess.run([sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize("number", ALL, ids=lambda n: n.name)
def test_handlers_are_put_back(number):
    before = {n: signal.getsignal(n) for n in ALL}
    with StopSignals() as signals:
        assert not signals.caught
        os.kill(os.getpid(), number)
        assert signals.caught and signals.interrupted is (number == signal.SIGINT)
    assert {n: signal.getsignal(n) for n in ALL} == before


def test_process_that_was_forked_is_not_told(tmp_path):
    """A worker that reads data gets what is sent to the whole group, and it is not the one that saves."""
    with StopSignals() as signals:
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(int(signals.caught))
        assert os.waitpid(child, 0)[1] == 0 and not signals.caught


def test_handlers_are_put_back_when_a_run_fails(tmp_path):
    before = {n: signal.getsignal(n) for n in ALL}
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, stream=Interrupted(2, lambda: 1 / 0))
    assert {n: signal.getsignal(n) for n in ALL} == before


def test_outside_the_main_thread_a_run_goes_without(tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(train(tmp_path, max_steps=2)[1]["steps"]))
    thread.start()
    thread.join(timeout=60)
    assert steps == [2]

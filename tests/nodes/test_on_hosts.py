"""torchrun, deepspeed and mpirun over hosts with a network and sshd each: ranks meet, survive a kill, save when told.

One config serves them all, and sbatch in test_on_slurm.py.
"""

import os
import shutil
import signal
import sys

import pytest
from nodes.conftest import wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(300)]


def finish(process, patience_s=120):
    """What it printed, once it has ended well."""
    told, _ = process.communicate(timeout=patience_s)
    assert process.returncode == 0, told
    return told


@pytest.fixture
def start(hosts):
    """`start(host, *command, **environment)`; what is still running at the end of the test is ended."""
    started = []

    def begin(host, *command, **environment):
        started.append(hosts.start(host, *command, **environment))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_deepspeed_by_a_hostfile_saves_when_its_launcher_is_told_to_end_and_goes_on(hosts, run, start, tmp_path):
    (tmp_path / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
    script = run.command(
        "engine.backend=deepspeed", "engine.zero_stage=2", "engine.max_steps=100", "engine.resume=auto"
    )
    command = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), *script]
    launcher = start("h1", *command)
    wait_for("5 steps", lambda: len(run.steps()) >= 5)
    launcher.terminate()
    launcher.communicate(timeout=60)
    wait_for("its processes to end", lambda: not hosts.workers("h1") + hosts.workers("h2"))
    assert run.saved() == run.steps()[-1] < 100
    told = finish(start("h1", *command))
    assert "2 x cpu on h1, backend deepspeed, ZeRO 2" in told and "resumed from" in told
    assert run.steps() == list(range(1, 101))


def test_torchrun_starts_again_by_itself_after_a_kill_and_trains_each_step_once(hosts, run, start):
    script = run.command("engine.max_steps=60", "engine.checkpoint_every_steps=10", "engine.resume=auto")
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "h1:29400", "--rdzv_id", "7", "--max-restarts", "2"]
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *rendezvous, *script]
    agents = [start(host, *command) for host in ("h1", "h2")]
    wait_for("a checkpoint", run.saved)
    os.kill(hosts.workers("h2")[0], signal.SIGKILL)
    told = [finish(agent) for agent in agents]
    assert any("2 x cpu" in text and "resumed from" in text for text in told)
    assert run.steps() == list(range(1, 61))


def test_mpirun_trains_on_two_hosts(hosts, run, start):
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun, of the package openmpi-bin")
    given = [word for name in ("PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", name)]
    place = ["--host", "h1,h2", "-x", "MASTER_ADDR=h1", "-x", "MASTER_PORT=29500"]
    script = run.command("engine.max_steps=3")
    told = finish(start("h1", "mpirun", "--allow-run-as-root", *place, *given, sys.executable, *script))
    assert "2 x cpu on h1, backend plain" in told and run.steps() == [1, 2, 3]


def test_torchrun_with_fixed_ranks_trains_on_three_hosts(hosts, run, start):
    script = run.command("engine.max_steps=3")
    place = ["--nnodes", "3", "--nproc_per_node", "1", "--master_addr", "h1", "--master_port", "29500"]
    agents = [start(f"h{i + 1}", "torchrun", *place, "--node_rank", str(i), *script) for i in (2, 1, 0)]
    told = [finish(agent) for agent in agents]
    assert "3 x cpu on h1, backend plain" in told[-1] and run.steps() == [1, 2, 3]

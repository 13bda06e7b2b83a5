"""The batch script with stand-ins for srun and scontrol: who meets where, what is started, what a signal does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"

SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
if [ "$1" = show ]; then printf 'node-7\\nnode-8\\n'; fi
"""
SRUN = """#!/bin/bash
# Records its arguments and environment, then waits for a signal as long as it is told to.
printf '%s\\n' "srun $*" >>"$CALLS"
echo "MASTER $MASTER_ADDR:$MASTER_PORT OMP $OMP_NUM_THREADS" >>"$CALLS"
[ -n "${KEEP:-}" ] && cp .hostfile-* "$KEEP"
trap 'echo "srun got USR1" >>"$CALLS"; exit 75' USR1
for ((i = 0; i < ${SECONDS_TO_RUN:-0} * 20; i++)); do sleep 0.05; done
exit "${STATUS:-0}"
"""


@pytest.fixture
def slurm(tmp_path):
    """`slurm(arguments, **environment)` starts the script in an empty folder; `.calls()` tells what it called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    class Job:
        log = tmp_path / "calls"

        def start(self, *arguments, **environment):
            self.log.write_text("")
            given = {
                "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(self.log), "SLURM_JOB_ID": "41234",
                "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
                "SLURM_CPUS_PER_TASK": "16",
            }  # fmt: skip
            given |= environment
            return subprocess.Popen(
                ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True
            )

        def run(self, *arguments, **environment):
            process = self.start(*arguments, **environment)
            _, self.errors = process.communicate(timeout=30)
            return process.returncode

        def calls(self):
            return self.log.read_text().splitlines()

        def wait_for(self, words):
            end = time.monotonic() + 10
            while not any(words in line for line in self.calls()):
                assert time.monotonic() < end, self.calls()
                time.sleep(0.02)

    return Job()


def test_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_job_asks_to_be_requeued_and_told_before_its_end():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(options)


def test_processes_meet_at_the_first_node_and_go_on_from_a_checkpoint(slurm):
    assert slurm.run("config.yaml", "seed=1", SLURM_GPUS_ON_NODE="8") == 0
    show, srun, where = slurm.calls()
    assert show == "scontrol show hostnames node-[7-8]"
    assert where == "MASTER node-7:11234 OMP 2"
    assert srun == (
        "srun --kill-on-bad-exit=1 --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=2 "
        "python launch/train.py config.yaml engine.resume=auto seed=1"
    )


def test_deepspeed_starts_one_launcher_a_node_with_a_hostfile(slurm, tmp_path):
    kept = tmp_path / "kept"
    assert (
        slurm.run("config.yaml", "engine.zero_stage=2", LAUNCHER="deepspeed", PROCS_PER_NODE="4", KEEP=str(kept)) == 0
    )
    assert kept.read_text() == "node-7 slots=4\nnode-8 slots=4\n"
    assert not list(tmp_path.glob(".hostfile-*"))
    srun = " ".join(slurm.calls())
    assert (
        "--nodes=2 --ntasks=2 --cpus-per-task=16 bash -c" in srun
        and "deepspeed --hostfile" in srun
        and "--no_ssh" in srun
    )
    assert "config.yaml engine.backend=deepspeed engine.resume=auto engine.zero_stage=2" in srun


def test_status_of_a_failed_run_is_the_jobs(slurm):
    assert slurm.run("config.yaml", STATUS="3") == 3
    assert not [c for c in slurm.calls() if "requeue" in c]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "term"])
def test_signal_is_passed_on_and_the_job_queued_again(slurm, number):
    process = slurm.start("config.yaml", SECONDS_TO_RUN="20")
    slurm.wait_for("MASTER")
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=10) == 0
    assert slurm.calls()[-2:] == ["srun got USR1", "scontrol requeue 41234"]


def test_wrong_launcher_and_missing_config_are_refused(slurm):
    assert slurm.run("config.yaml", LAUNCHER="mpirun") == 2 and "srun or deepspeed was wanted" in slurm.errors
    assert slurm.run() == 2 and "usage: sbatch" in slurm.errors


@pytest.mark.dist
def test_two_tasks_that_srun_starts_train_together(tmp_path):
    """What srun gives each task (SLURM_PROCID and so on, no RANK) is enough to meet and to train."""
    overrides = ["engine.max_steps=2", "engine.log_every_steps=1", "engine.device=cpu", "evaluate.robust=null",
                 "evaluate.knn=null", "evaluate.linear=null", "model.widths=[8,8,8,8]", "method.hidden=16", "method.out=16", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "train.py"), str(ROOT / "configs/defend/vespr_cifar10_mini.yaml")]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    tasks = [
        subprocess.Popen(
            [*command, *overrides],
            env=clean | {
                "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 20000), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [t.communicate(timeout=120)[1] for t in tasks]
    assert [t.returncode for t in tasks] == [0, 0], errors
    assert "2 x cpu" in errors[0] and re.search(r"^step +2/2 ", errors[0], re.MULTILINE)
    assert "step" not in errors[1]  # rank 0 speaks
    assert (tmp_path / "run" / "results.json").is_file()

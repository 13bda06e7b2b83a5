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
NODE_SCRIPT = ROOT / "launch" / "slurm" / "deepspeed_node.sh"
GRID_SCRIPT = ROOT / "launch" / "slurm" / "grid.sbatch"

SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
if [ "$2" = hostnames ]; then printf 'node-7\\nnode-8\\n'; fi
if [ "$2" = show ]; then echo "JobId=$4 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None}"; fi
"""
SRUN = """#!/bin/bash
# Records its arguments and environment, then waits for a signal as long as it is told to.
printf '%s\\n' "srun $*" >>"$CALLS"
echo "MASTER $MASTER_ADDR:$MASTER_PORT OMP $OMP_NUM_THREADS" >>"$CALLS"
trap 'sleep 0.1; echo "srun got USR1" >>"$CALLS"; exit 75' USR1
for ((i = 0; i < ${SECONDS_TO_RUN:-0} * 20; i++)); do sleep 0.05; done
exit "${STATUS:-0}"
"""
DEEPSPEED = f"""#!{sys.executable}
import os, signal, subprocess, sys
calls = open(os.environ["CALLS"], "a", buffering=1)
print(*open(sys.argv[2]).read().split(chr(10)), file=calls)
print(*sys.argv[3:], file=calls)
TRAIN = '''
import os, signal, sys
calls = open(os.environ["CALLS"], "a", buffering=1)
def leave(*_):
    os.write(calls.fileno(), b"process told\\\\n")  # a second signal may come meanwhile
    os._exit(75)
signal.signal(signal.SIGUSR1, leave)
signal.signal(signal.SIGTERM, leave)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
print("process ready", file=calls)
signal.pause()
'''
status = subprocess.run([sys.executable, "-c", TRAIN]).returncode
print("launcher got", status, file=calls)
sys.exit(status)
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

        def start(self, *arguments, script=SCRIPT, **environment):
            self.log.write_text("")
            given = {
                "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(self.log), "SLURM_JOB_ID": "41234",
                "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
                "SLURM_JOB_CPUS_PER_NODE": "72,16(x2)",
            }  # fmt: skip
            given |= environment
            return subprocess.Popen(
                ["bash", str(script), *arguments],
                cwd=ROOT,
                env=given,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
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


@pytest.mark.parametrize("script", sorted((ROOT / "launch" / "slurm").iterdir()), ids=lambda p: p.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", [SCRIPT, GRID_SCRIPT], ids=lambda p: p.name)
def test_job_asks_to_be_requeued_and_told_before_its_end(script):
    options = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(options)


def test_processes_meet_at_the_first_node_and_go_on_from_a_checkpoint(slurm):
    assert slurm.run("config.yaml", "seed=1", SLURM_GPUS_ON_NODE="8") == 0
    show, srun, where, _ = slurm.calls()
    assert show == "scontrol show hostnames node-[7-8]"
    assert where == "MASTER node-7:11234 OMP 2"
    assert srun == (
        "srun --kill-on-bad-exit=1 --overcommit --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=2 "
        "python launch/train.py config.yaml engine.resume=auto seed=1"
    )


def test_deepspeed_starts_one_launcher_a_node(slurm):
    assert slurm.run("config.yaml", "engine.zero_stage=2", LAUNCHER="deepspeed", PROCS_PER_NODE="4") == 0
    assert (
        "srun --kill-on-bad-exit=1 --overcommit --nodes=2 --ntasks=2 --cpus-per-task=16 "
        "launch/slurm/deepspeed_node.sh 4 config.yaml engine.backend=deepspeed engine.resume=auto engine.zero_stage=2"
    ) in slurm.calls()


def test_deepspeeds_launcher_has_a_hostfile_and_does_not_get_the_signals_that_its_processes_get(slurm, tmp_path):
    (tmp_path / "bin" / "deepspeed").write_text(DEEPSPEED)
    (tmp_path / "bin" / "deepspeed").chmod(0o755)
    node = {"SLURM_NODEID": "1", "MASTER_ADDR": "node-7", "MASTER_PORT": "11234", "PYTHON": sys.executable}
    process = slurm.start("4", "config.yaml", script=NODE_SCRIPT, **node)
    slurm.wait_for("process ready")
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does: all processes of the step
    assert process.wait(timeout=10) == 75
    show, hosts, arguments, *_ = slurm.calls()
    assert show == "scontrol show hostnames node-[7-8]" and hosts.split() == ["node-7", "slots=4", "node-8", "slots=4"]
    assert arguments.endswith(
        "--no_ssh --node_rank=1 --master_addr=node-7 --master_port=11234 launch/train.py config.yaml"
    )
    assert "process told" in slurm.calls() and "launcher got 75" in slurm.calls()


def test_status_of_a_failed_run_is_the_jobs(slurm):
    assert slurm.run("config.yaml", STATUS="3") == 3
    assert not [c for c in slurm.calls() if "requeue" in c]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "term"])
def test_signal_is_passed_on_and_the_job_queued_again(slurm, number):
    process = slurm.start("config.yaml", SECONDS_TO_RUN="20")
    slurm.wait_for("MASTER")
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(timeout=10) == 0
    assert slurm.calls()[-3:] == ["srun got USR1", "scontrol --oneliner show job 41234", "scontrol requeue 41234"]


@pytest.mark.parametrize(
    ("status", "preempted", "requeued"),
    [("75", "None", True), ("138", "None", True), ("143", "2030-01-01T00:00:00", True), ("143", "None", False),
     ("137", "None", False)],
    ids=["saved", "stopped by USR1", "preempted with grace", "ended as another failed", "killed"],
)  # fmt: skip
def test_status_tells_whether_a_job_whose_script_was_not_told_is_queued_again(slurm, status, preempted, requeued):
    assert slurm.run("config.yaml", STATUS=status, PREEMPTED=preempted) == (0 if requeued else int(status))
    assert ("scontrol requeue 41234" in slurm.calls()) is requeued
    assert ("it saved itself" in slurm.errors) is (status == "75")


def test_job_that_slurm_ends_is_left_to_slurm(slurm):
    """Cancelled, preempted without grace, or out of time."""
    assert slurm.run("config.yaml", STATUS="75", STATE="COMPLETING") == 75
    assert "Slurm ends the job itself" in slurm.errors and not [c for c in slurm.calls() if "requeue" in c]


def test_array_of_one_run_is_refused_and_its_number_is_put_in(slurm):
    assert slurm.run("config.yaml", "seed=1", SLURM_ARRAY_TASK_ID="3") == 2 and "seed={array}" in slurm.errors
    assert slurm.run("config.yaml", "seed={array}") == 2 and "this job is none" in slurm.errors
    assert slurm.run("config.yaml", "seed={array}", "run.dir=a/{array}-{array}", SLURM_ARRAY_TASK_ID="3") == 0
    assert slurm.calls()[1].endswith("engine.resume=auto seed=3 run.dir=a/3-3")


def test_task_of_an_array_trains_its_part_of_a_grid(slurm):
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    whole = task | {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MAX": "4"}
    assert slurm.run("grid.yaml", "dir=x", script=GRID_SCRIPT, **whole) == 0
    assert slurm.calls()[0].endswith("python -m poisonshield.cli grid grid.yaml dir=x --part 3/4")
    gaps = task | {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "3"}
    assert slurm.run("grid.yaml", script=GRID_SCRIPT, **gaps) == 2 and "--array=1-N" in slurm.errors


def test_wrong_launcher_and_missing_config_are_refused(slurm):
    assert slurm.run("config.yaml", LAUNCHER="mpirun") == 2 and "srun or deepspeed was wanted" in slurm.errors
    assert slurm.run() == 2 and "usage: sbatch" in slurm.errors


@pytest.mark.dist
def test_two_tasks_that_srun_starts_train_together(tmp_path):
    """What srun gives each task (SLURM_PROCID and so on, no RANK) is enough to meet and to train."""
    overrides = ["engine.max_steps=2", "engine.log_every_steps=1", "engine.device=cpu", "evaluate.robust=null",
                 "model.widths=[8,8,8,8]", "method.hidden=16", "method.out=16",
                 f"run.dir={tmp_path / 'run'}"]  # fmt: skip
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

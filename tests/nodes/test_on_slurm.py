"""launch/slurm on a real Slurm: every way to be told to stop ends with a run that was trained whole, each step once.

Starting the processes is nearly all of the time, so one job goes through several events, one after another.
"""

import json
import time

import pytest
import yaml
from nodes.conftest import CONFIG, ROOT, SMALL, Job, Run, wait_for

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]
STEPS = 200
TRAIN = "launch/slurm/train.sbatch"


@pytest.fixture
def start(slurm, run, tmp_path):
    """`start(**environment)`: a job of two nodes that trains `run`."""

    def submit(*overrides, **environment):
        settings = [*SMALL, f"engine.max_steps={STEPS}", f"run.dir={run.folder}", *overrides]
        options = ["--nodes=2", "--cpus-per-task=2", "--time=20"]
        return slurm.submit(*options, TRAIN, CONFIG, *settings, log=tmp_path / "log", **environment)

    return submit


def wait_for_more(job, run, lines=5):
    """Until so many more steps were trained than are saved."""
    wait_for(lambda: f"{lines} steps:\n{job.text()}", lambda: len(run.steps()) >= run.saved() + lines)


def test_job_that_is_told_to_stop_in_every_way_trains_each_step_once(slurm, run, start):
    slurm.grant_grace(60)
    job = start()
    wait_for("the script", lambda: "processes on each" in job.text())
    slurm.preempt()  # while the processes still import: the script itself is not told
    job.wait("RUNNING", restarts=1)
    wait_for_more(job, run)

    saves = job.text().count("it saved itself")
    job.warn()
    job.wait("PENDING", restarts=2)
    first = run.saved()
    assert first == run.steps()[-1] and job.text().count("status 75, it saved itself; queueing again") == saves + 1
    job.wait("RUNNING", restarts=2)
    wait_for_more(job, run)

    slurm.grant_grace(0)
    slurm.preempt()
    job.wait("RUNNING", restarts=3)
    assert run.saved() > first and "status 75, it saved itself; Slurm ends the job itself" in job.text()
    job.wait("COMPLETED", restarts=3)
    assert run.steps() == list(range(1, STEPS + 1)) and (run.folder / "results.json").is_file()


def test_deepspeeds_launchers_let_their_processes_save(slurm, run, start):
    slurm.grant_grace(60)
    job = start(LAUNCHER="deepspeed")
    wait_for("the script", lambda: "processes on each" in job.text())
    job.warn()  # while the launchers still import
    job.wait("RUNNING", restarts=1)
    wait_for_more(job, run)

    slurm.preempt()
    job.wait("PENDING", restarts=2)
    assert run.saved() == run.steps()[-1] and "status 75, it saved itself; queueing again" in job.text()
    job.wait("COMPLETED", restarts=2)
    assert run.steps() == list(range(1, STEPS + 1)) and "backend deepspeed" in job.text()


def test_cancelled_job_saves_itself_and_stays_cancelled(slurm, run, start):
    job = start()
    wait_for_more(job, run)
    slurm.call("scancel", job.number)
    job.wait("CANCELLED")
    wait_for("its processes", lambda: "Slurm ends the job itself" in job.text())
    assert "status 75, it saved itself" in job.text() and run.saved() == run.steps()[-1]
    time.sleep(2)
    assert job.state() == ("CANCELLED", 0)


def test_job_that_loses_a_node_is_queued_again_and_goes_on(slurm, run, start):
    job = start("engine.checkpoint_every_steps=10")
    wait_for(lambda: f"a checkpoint:\n{job.text()}", lambda: run.saved())
    slurm.kill_node("n2")
    job.wait("PENDING", restarts=1)
    slurm.start_node("n2")
    job.wait("COMPLETED", restarts=1)
    assert "resumed from" in job.text()
    assert run.steps() == list(range(1, STEPS + 1))


def test_failed_run_is_not_queued_again(slurm, run, start):
    job = start("optimizer.lr=-1")
    job.wait("FAILED")
    assert "optimizer.lr" in job.text() and job.state() == ("FAILED", 0)


def test_array_is_a_run_for_each_number_and_more_processes_than_cpus_run(slurm, run, tmp_path):
    """As the head of the script has it: nothing is said of CPUs, so that a node gives one."""
    settings = [*SMALL, "engine.max_steps=2", "seed={array}", f"run.dir={run.folder}-{{array}}"]
    job = slurm.submit("--array=3-4", TRAIN, CONFIG, *settings, log=tmp_path / "log-%a", PROCS_PER_NODE="2")
    for number in (3, 4):
        task = Job(slurm, f"{job.number}_{number}", tmp_path / f"log-{number}")
        task.wait("COMPLETED")
        made = Run(run.folder.with_name(f"run-{number}"))
        assert made.steps() == [1, 2] and yaml.safe_load((made.folder / "config.yaml").read_text())["seed"] == number
        assert "1 nodes, 2 processes on each, 1 CPUs for each process" in task.text() and "2 x cpu" in task.text()


def test_grid_is_shared_by_the_tasks_of_an_array(slurm, tmp_path):
    settings = dict(setting.split("=", 1) for setting in [*SMALL, "engine.max_steps=2"])
    settings = {key: yaml.safe_load(value) for key, value in settings.items()}
    base = str(ROOT / "configs" / f"{CONFIG}.yaml")
    grid = {
        "base": base,
        "dir": str(tmp_path / "grid"),
        "settings": settings,
        "blocks": [{"method.temperature": [0.2, 0.5]}],
    }
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    log = tmp_path / "log-%a"
    job = slurm.submit("--array=1-2", "launch/slurm/grid.sbatch", str(tmp_path / "grid.yaml"), log=log)
    for part in (1, 2):
        task = Job(slurm, f"{job.number}_{part}", tmp_path / f"log-{part}")
        task.wait("COMPLETED")
        assert "run 1 of 1" in task.text()
    assert len(list(tmp_path.glob("grid/*/seed-0/results.json"))) == 2

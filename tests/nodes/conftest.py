"""Hosts and a Slurm on this machine, as the scripts of this folder make them: what tests marked `nodes` share.

They need root, network namespaces and some packages, and take minutes: `pytest -m nodes tests/nodes`. All of them wait
for what a run writes, the lines of metrics.jsonl, and for what Slurm says of a job.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = "defend/vespr_cifar10_mini"
SMALL = [
    "engine.log_every_steps=1", "engine.device=cpu", "engine.threads=1", "model.widths=[8,8,16,16]",
    "model.batch_norm=local", "method.hidden=32", "method.out=32", "data.batch_size=48", "optimizer.lr=0.002",
    "evaluate.robust=null", "evaluate.knn=null", "evaluate.linear=null",
]  # fmt: skip
PATIENCE_S = 90
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def wait_for(what, condition, patience_s=PATIENCE_S):
    """What the condition gives, once it is true. what: said if it never is; a function may tell more then."""
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {patience_s} s for {what() if callable(what) else what}"
        time.sleep(0.05)
    return found


class Run:
    """A run folder, as one reads it while others train there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps that were logged, whole lines only."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def losses(self) -> list[float]:
        """The loss of each logged step."""
        return [json.loads(line)["loss"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def saved(self) -> int:
        """The step of the newest whole checkpoint, 0 without one."""
        return max((int(p.parent.name[5:]) for p in self.folder.glob("checkpoints/step-*/index.sha256")), default=0)

    def command(self, *overrides: str) -> list[str]:
        """What a launcher is given: script, config and settings."""
        return ["launch/train.py", CONFIG, *SMALL, *overrides, f"run.dir={self.folder}"]


@pytest.fixture(scope="session", autouse=True)
def tracebacks_are_removed() -> Iterator[None]:
    """A rank that fails leaves one in the working folder, which is the checkout here."""
    before = set(ROOT.glob("poisonshield-rank-*.traceback.txt"))
    yield
    for path in set(ROOT.glob("poisonshield-rank-*.traceback.txt")) - before:
        path.unlink()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run of a test."""
    return Run(tmp_path / "run")


def refuse(*programs: str) -> None:
    """Skip where this machine cannot be several."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make hosts on this machine")
    if missing := [name for name in programs if shutil.which(name, path=ENVIRONMENT["PATH"]) is None]:
        pytest.skip(f"needs {', '.join(missing)}: see launch/README.md")
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs leave to make namespaces: {tried.stderr.strip()}")


class Hosts:
    """h1 to h3, each with a network, a name and an sshd of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, host: str, *command: str, **environment: str) -> subprocess.Popen:
        """A command on a host, in a session of its own, in the folder of the checkout."""
        return subprocess.Popen(
            [str(HERE / "on_host.sh"), str(self.folder), host, *command], cwd=ROOT, env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def workers(self, host: str) -> list[int]:
        """The processes that train there; their launchers have more words before the script."""
        name = (self.folder / "switch").read_text().strip()
        told = subprocess.run(["ip", "netns", "pids", f"{name}-{host}"], capture_output=True, text=True)
        return [int(pid) for pid in told.stdout.split() if _trains(int(pid))]


def _trains(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return words[1:3] == ["-u", "launch/train.py"]


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts; all that runs there ends with the tests."""
    refuse("ip", "unshare", "ssh", "sshd", "pdsh", "deepspeed", "torchrun")
    folder = tmp_path_factory.mktemp("hosts")
    subprocess.run([HERE / "hosts_up.sh", folder, "3"], env=ENVIRONMENT, check=True, timeout=60)
    yield Hosts(folder)
    subprocess.run([HERE / "hosts_down.sh", folder], env=ENVIRONMENT, check=True, timeout=60)


class Slurm:
    """A controller and two nodes of two CPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str, log: Path, **environment: str) -> "Job":
        """sbatch."""
        options = ["sbatch", "--parsable", f"--output={log}", *words]
        done = subprocess.run(
            options, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)

    def grant_grace(self, seconds: int) -> None:
        """How long a preempted job of `main` may go on."""
        self.call("scontrol", "update", "partition=main", f"GraceTime={seconds}")

    def preempt(self) -> None:
        """A short job that others make room for."""
        self.call("sbatch", "--partition=high", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")

    def start_node(self, name: str) -> None:
        """Its slurmd."""
        subprocess.run([HERE / "slurm_node.sh", self.folder, name], env=self.environment, check=True, timeout=60)

    def kill_node(self, name: str) -> None:
        """At once: its slurmd, and on it the steps of jobs and their processes."""
        daemon = int((self.folder / f"slurmd-{name}.pid").read_text())
        for pid in [daemon, *_find_steps(name, self.environment["SLURM_CONF"])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _find_steps(node: str, conf: str) -> list[int]:
    """The processes of jobs on a node and, before them, the daemons that started those."""
    wanted, tasks, parents = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={conf}"}, [], []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if wanted <= set((place / "environ").read_text(errors="replace").split("\0")):
                tasks.append(int(place.name))
                parents.append(int((place / "stat").read_text().rsplit(")", 1)[1].split()[1]))
    steps = {pid for pid in parents if pid > 1 and Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")}
    return [*steps, *tasks]


class Job:
    """A job, as scontrol tells of it."""

    def __init__(self, slurm: Slurm, number: str, log: Path) -> None:
        self.slurm, self.number, self.log = slurm, number, log

    def state(self) -> tuple[str, int]:
        """Its JobState, and how often it was queued again; of one moment."""
        told = self.slurm.call("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(r"JobState=(\w+) .*Restarts=(\d+)", told)
        assert found, told
        return found[1], int(found[2])

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text() if self.log.is_file() else ""

    def wait(self, state: str, restarts: int = 0) -> None:
        """Until it has this state, after so many requeues; a requeued one does not wait its two minutes."""

        pending_since = None

        def arrived() -> bool:
            nonlocal pending_since
            now = self.state()
            if now[0] == "PENDING" and now[1] and state != "PENDING":
                pending_since = pending_since or time.monotonic()
                if time.monotonic() > pending_since + 1.5:  # sooner, Slurm takes its old end for that of the new start
                    self.slurm.call("scontrol", "update", f"jobid={self.number}", "StartTime=now")
                    pending_since = None
            assert now[0] not in ENDS - {state}, f"{now}:\n{self.text()}"
            return now == (state, restarts)

        wait_for(lambda: f"{state} after {restarts}, is {self.state()}:\n{self.text()}", arrived)

    def warn(self) -> None:
        """What Slurm sends before the time limit."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", self.number)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """It ends with the tests, and with it what runs there."""
    refuse("slurmctld", "slurmd", "munged", "sbatch", "unshare", "deepspeed")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "slurm_up.sh", folder, "2"], env=ENVIRONMENT | {"LOST_AFTER": "10"}, check=True, timeout=60)
    yield Slurm(folder)
    subprocess.run([HERE / "slurm_down.sh", folder], env=ENVIRONMENT, check=True, timeout=60)

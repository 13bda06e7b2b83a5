"""Who am I and on which device: launchers' environments, GPUs that are not there, seeds, and leaving in every exit."""

import logging
import os
import random
import socket

import numpy
import pytest
import torch
import torch.distributed as dist

from poisonshield import collectives
from poisonshield.engine import processes as own_processes
from poisonshield.engine.meeting import Meeting
from poisonshield.engine.processes import choose_device, processes, seed_everything
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import BackendError, ConfigError

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}


@pytest.fixture
def environ(monkeypatch):
    """An environment that no launcher has touched; what a test sets in it is gone afterwards."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a plain dict: nothing reaches the real environment
    os.environ.clear()
    os.environ.update(clean)
    monkeypatch.setattr(collectives.map_launcher_environment, "__defaults__", (os.environ,))
    return os.environ


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that this machine has some GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def config(**settings):
    return EngineConfig(**{"max_steps": 1, "device": "cpu", **settings})


@pytest.fixture
def joined(monkeypatch):
    """What would be asked of torch when a group is made, with the environment of that moment; none is made, and nobody
    is met."""
    calls = []

    def meet(timeout):
        meeting = Meeting(dist.HashStore(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        monkeypatch.setattr(meeting, "agree", lambda facts: calls.append(dict(facts)))
        return meeting

    monkeypatch.setattr(own_processes, "meet", meet)

    def record(backend, **settings):
        numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        calls.append({"backend": backend, **settings, **numbers})

    monkeypatch.setattr(dist, "init_process_group", record)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    return calls


def test_tasks_of_srun_get_torch_numbers_before_they_join(environ, joined):
    environ.update({**SLURM, **MEETING})
    with processes(config(), seed=1):
        assert len(joined) == 2
    facts, call, left = joined
    assert facts["torch"] == torch.__version__ and facts["kind of device"] == "cpu"
    assert (call["backend"], call["RANK"], call["LOCAL_RANK"], call["WORLD_SIZE"]) == ("gloo", "5", "1", "8")
    assert (call["rank"], call["world_size"]) == (5, 8)
    assert call["timeout"].total_seconds() == 1800 and left == "left"


def test_numbers_of_torchrun_win_over_those_of_slurm(environ, joined):
    environ.update({**SLURM, **MEETING, "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})
    with processes(config(), seed=1):
        pass
    assert (joined[1]["RANK"], joined[1]["LOCAL_RANK"], joined[1]["WORLD_SIZE"]) == ("1", "0", "2")


@pytest.mark.parametrize("numbers", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {**SLURM, "SLURM_NTASKS": "1"}], ids=str)
def test_one_process_makes_no_group(environ, joined, numbers):
    environ.update(numbers)
    with processes(config(), seed=1) as device:
        assert device == torch.device("cpu") and (collectives.rank(), collectives.world_size()) == (0, 1)
    assert joined == []


def test_tasks_of_srun_without_a_meeting_point_are_refused(environ, joined):
    environ.update(SLURM)
    with pytest.raises(ConfigError, match="Slurm started 8 processes, but without MASTER_ADDR and MASTER_PORT"):
        with processes(config(), seed=1):
            pass
    assert joined == []


@pytest.mark.parametrize("where", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "door"}], ids=["nowhere", "no port"])
def test_process_that_cannot_join_says_who_it_is_and_where_it_went(environ, where):
    environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **where})
    with pytest.raises(BackendError, match="GLOO_SOCKET_IFNAME") as error:
        with processes(config(), seed=1):
            pass
    place = f"{where.get('MASTER_ADDR')}:{where.get('MASTER_PORT')}"
    assert f"rank 1 of 2 on {socket.gethostname()} could not join the others at {place}: " in str(error.value)
    assert not dist.is_initialized()


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_group_is_left_in_every_exit(environ, joined, ending):
    environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEETING})
    with pytest.raises(ending):
        with processes(config(), seed=1):
            raise ending
    assert joined[-1] == "left"


def test_deepspeed_alone_is_told_to_use_the_cpu_and_gets_a_group_that_stays(environ, joined):
    with processes(config(backend="deepspeed", zero_stage=1), seed=1):
        pass
    (call,) = joined  # alone, there is nobody to meet
    assert (call["backend"], call["rank"], call["world_size"]) == ("gloo", 0, 1)
    assert environ["DS_ACCELERATOR"] == "cpu" and environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("wish", "count", "local", "expected"),
    [
        ("auto", 0, "3", "cpu"), ("cpu", 2, "1", "cpu"), ("auto", 2, None, "cuda:0"), ("auto", 2, "1", "cuda:1"),
        ("cuda", 1, "0", "cuda:0"),
    ],
)  # fmt: skip
def test_device_is_the_one_of_the_local_rank(environ, gpus, wish, count, local, expected):
    gpus(count)
    environ.update({} if local is None else {"LOCAL_RANK": local})
    assert choose_device(wish) == torch.device(expected)


def test_task_that_slurm_shows_only_its_own_gpu_takes_that(environ, gpus):
    gpus(1)
    environ.update({**SLURM, "LOCAL_RANK": "3"})
    assert choose_device("auto") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("wish", "count", "local", "more"),
    [("cuda", 0, "0", {}), ("auto", 2, "2", {}), ("auto", 1, "1", {}), ("auto", 2, "5", SLURM)],
    ids=["none at all", "third of two", "second of one", "sixth of two in slurm"],
)
def test_missing_gpu_is_named_with_what_to_do(environ, gpus, wish, count, local, more):
    gpus(count)
    environ.update({"LOCAL_RANK": local, **more})
    words = f"local rank {local} on {socket.gethostname()} wants GPU {local}, but {count} can be seen there"
    with pytest.raises(BackendError, match=words) as error:
        choose_device(wish)
    assert "set engine.device: cpu" in str(error.value)


def draws():
    return torch.rand(3).tolist(), random.random(), numpy.random.rand(2).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 1])
def test_seed_fixes_every_global_generator(seed):
    seed_everything(seed)
    first = draws()
    assert draws() != first
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_method_built_inside_has_the_weights_of_the_seed(environ):
    built = []
    for seed in (1, 1, 2):
        torch.rand(7)
        with processes(config(), seed=seed):
            built.append(torch.nn.Linear(3, 3).weight.tolist())
    assert built[0] == built[1] != built[2]


def test_only_the_first_rank_speaks_unless_it_fails(environ, joined, monkeypatch, caplog):
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEETING})
    before = logging.getLogger("poisonshield").level
    with pytest.raises(ValueError):
        with processes(config(), seed=1):
            logging.getLogger("poisonshield.engine.trainer").warning("rank 1 has an opinion")
            logging.getLogger("poisonshield.engine.trainer").error("rank 1 fails")
            raise ValueError("no pixels")
    assert caplog.messages == ["rank 1 fails"]
    assert logging.getLogger("poisonshield").level == before


def test_numbers_of_mpirun_are_read_too(environ, joined):
    open_mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    mpich = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}
    for numbers in (open_mpi, mpich):
        environ.update({**numbers, **MEETING})
        with processes(config(), seed=1):
            pass
        call = joined[1]
        assert (call["RANK"], call["LOCAL_RANK"], call["WORLD_SIZE"]) == ("3", "1", "4")
        joined.clear()
        for name in (*numbers, *MEETING, "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del environ[name]
    environ.update(open_mpi)
    with pytest.raises(ConfigError, match="Open MPI started 4 processes, but without MASTER_ADDR and MASTER_PORT"):
        with processes(config(), seed=1):
            pass


def test_threads_are_as_asked(environ):
    before = torch.get_num_threads()
    try:
        with processes(config(threads=2), seed=1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

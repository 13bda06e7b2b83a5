"""Start and end of the processes that train together: who am I, which device, one seed; torn down in every exit."""

import datetime
import importlib.util
import logging
import os
import random
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
import torch.distributed as dist

from poisonshield import collectives
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.meeting import Meeting, current, facts_of_process, meet, taking_part
from poisonshield.engine.settings import EngineConfig, backends
from poisonshield.errors import BackendError, reason_of


def choose_device(wish: str) -> torch.device:
    """This process's device: its LOCAL_RANK's GPU if there is one (or `cuda` is demanded), else the CPU."""
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if local >= count and count == 1 and "SLURM_PROCID" in os.environ:
        local = 0  # Slurm shows each task its own GPU only
    if local >= count:
        raise BackendError(
            f"local rank {local} on {socket.gethostname()} wants GPU {local}, but {count} can be seen there.\n"
            "  Start fewer processes on this node, make more GPUs visible, or set engine.device: cpu."
        )
    return torch.device("cuda", local)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def refuse_missing(config: EngineConfig) -> None:
    """Raise BackendError for a package that the settings need and this environment lacks; nothing is imported."""
    backend: type[Backend] = backends.get(config.backend)
    for package in (*backend.packages, *(["tensorboard"] if config.tensorboard else [])):
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"{package} is asked for and not installed: pip install '.[{package}]'.")


@contextmanager
def processes(config: EngineConfig, *, seed: int, facts: Mapping[str, Any] | None = None) -> Iterator[torch.device]:
    """Join the other processes if a launcher started several, and give this one's device; leave them at the end.

    Build the method inside: every rank is seeded alike here, so all start from the same weights. A group that exists
    already is used and left in place. facts: what all ranks must have in common beside versions and devices, by name;
    where they meet here, they compare it first. Raises BackendError if they do not meet, and ConfigError on every rank
    if they have not been told the same.
    """
    collectives.map_launcher_environment()
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend: type[Backend] = backends.get(config.backend)
    backend.prepare_process(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    package_log = logging.getLogger("poisonshield")
    level = package_log.level
    with ExitStack() as stack:
        _join(stack, config, device, facts or {})
        if not dist.is_initialized() and backend.needs_group:
            _make_group_of_one(device)
        if collectives.rank() > 0:
            package_log.setLevel(logging.ERROR)  # rank 0 speaks, the others only when they fail
        stack.callback(package_log.setLevel, level)
        seed_everything(seed)
        with _arithmetic(config):
            yield device


@contextmanager
def _arithmetic(config: EngineConfig) -> Iterator[None]:
    """Inside, a GPU chooses algorithms and rounds factors as the settings say; where they say nothing, as before."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    if config.cudnn_benchmark:
        cudnn.benchmark = True
    if config.tf32 is not None:
        cudnn.allow_tf32 = products.allow_tf32 = config.tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before


@contextmanager
def met(config: EngineConfig) -> Iterator[Meeting | None]:
    """The meeting with the other processes that a launcher started, None without such; `processes` inside joins them.

    Around what each process does before it is ready to train: an error there is told to those that wait for it. Raises
    BackendError if they do not come, ConfigError if their numbers do not fit together.
    """
    collectives.map_launcher_environment()
    if current() is not None or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield current()
        return
    meeting = meet(datetime.timedelta(minutes=config.timeout_minutes))
    with taking_part(meeting):
        yield meeting


def _join(stack: ExitStack, config: EngineConfig, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Make the group of the processes that meet, if there is none, until the stack is left."""
    meeting = stack.enter_context(met(config))
    if meeting is None or dist.is_initialized():
        return
    meeting.agree({**facts_of_process(device), **facts})
    _make_group(meeting, device, datetime.timedelta(minutes=config.timeout_minutes))
    stack.callback(dist.destroy_process_group)


def _make_group(meeting: Meeting, device: torch.device, timeout: datetime.timedelta) -> None:
    backend = _messenger(device)
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", meeting.store), rank=meeting.rank, world_size=meeting.world,
            timeout=timeout, device_id=device if backend == "nccl" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as err:
        raise BackendError(
            f"rank {meeting.rank} of {meeting.world} on {socket.gethostname()} met the others, and {backend} finds no "
            f"way to them: {reason_of(err)}\n"
            "  Where the host name resolves to loopback, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the "
            "network's interface."
        ) from err


def _make_group_of_one(device: torch.device) -> None:
    """It stays: a backend that needs a group alone may hold on to it, and the next run takes it again."""
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(_messenger(device), store=dist.HashStore(), rank=0, world_size=1)


def _messenger(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"

"""Start and end of the processes that train together: who am I, which device, one seed; torn down in every exit."""

import datetime
import importlib.util
import logging
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist

from poisonshield import collectives
from poisonshield.engine.backends.base import Backend
from poisonshield.engine.settings import EngineConfig, backends
from poisonshield.errors import BackendError, reason_of

log = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=30)  # the longest honest wait: rank 0 hashing a large checkpoint


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
def processes(config: EngineConfig, *, seed: int) -> Iterator[torch.device]:
    """Join the other processes if a launcher started several, and give this one's device; leave them at the end.

    Build the method inside: every rank is seeded alike here, so all start from the same weights. A group that exists
    already is used and left in place.
    """
    collectives.map_launcher_environment()
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend: type[Backend] = backends.get(config.backend)
    backend.prepare_process(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ours = _join(device, alone_too=backend.needs_group)
    rank, world = collectives.rank(), collectives.world_size()
    package_log = logging.getLogger("poisonshield")
    level = package_log.level
    if rank > 0:
        package_log.setLevel(logging.ERROR)  # rank 0 speaks, the others only when they fail
    seed_everything(seed)
    try:
        with _arithmetic(config):
            yield device
    except Exception as err:
        if world > 1:
            kind, host = type(err).__name__, socket.gethostname()
            log.error("rank %d of %d on %s failed: %s: %s", rank, world, host, kind, reason_of(err))
        raise
    finally:
        package_log.setLevel(level)
        if ours:
            dist.destroy_process_group()


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


def _join(device: torch.device, *, alone_too: bool) -> bool:
    """Make the group that the environment names (alone_too: or one of this process); True if it is to be left."""
    world, backend = int(os.environ.get("WORLD_SIZE", "1")), "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized() or (world < 2 and not alone_too):
        return False
    if world < 2:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return False  # it stays: a backend that needs a group alone may hold on to it, and the next run takes it again
    rank, where = os.environ.get("RANK"), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if backend == "nccl" else None)
    except (RuntimeError, ValueError) as err:
        raise BackendError(
            f"rank {rank} of {world} on {socket.gethostname()} could not join the others at {where}: {err}\n"
            "  Are all processes started, with one MASTER_ADDR and MASTER_PORT? Where the host name resolves to "
            "loopback, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network's interface."
        ) from err
    return True

"""Runs a function on several gloo ranks of this machine and returns each rank's answer, for tests marked `dist`.

Ranks meet through a file, so no port can clash; a rank that raises ends the test at once with its own trace.
Start-up is nearly all of the time (2 to 4 s): group many checks into one function.
"""

import datetime
import os
import queue
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def _worker(
    rank: int, world: int, folder: str, deepspeed: bool, patience_s: float, fn: Callable, args: tuple, answers: Any
) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", datetime.timedelta(seconds=patience_s)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    try:
        if deepspeed:  # the engine does the same; here for tests that use deepspeed without the engine
            import deepspeed as ds
            import deepspeed.ops

            ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            ds.init_distributed(dist_backend="gloo", verbose=False)
        answers.put((rank, fn(rank, world, *args)))
        answers.close()
        answers.join_thread()
        torch.distributed.barrier()
    except BaseException:
        torch.distributed.destroy_process_group()
        raise
    os._exit(0)  # all is said; taking gloo's threads down in an orderly way aborts a loaded machine now and then


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_dist(
    fn: Callable, world: int, *args: Any, deepspeed: bool = False, timeout_s: float = 120, patience_s: float = 60
) -> list[Any]:
    """[fn(rank, world, *args) for each rank], every rank in its own process. patience_s: the group's own timeout.

    fn must be a module-level function and return plain Python values (tensors as lists or numpy arrays).
    """
    answers = mp.get_context("spawn").Queue()
    out: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, deepspeed, patience_s, fn, args, answers)
        context = mp.start_processes(_worker, arguments, nprocs=world, join=False, start_method="spawn")
        end = time.monotonic() + timeout_s
        ended = False
        while not (ended and len(out) == world):
            try:  # take answers while waiting: a large one blocks its sender until it is read
                rank, answer = answers.get(timeout=0.1)
                out[rank] = answer
            except queue.Empty:
                pass
            ended = ended or context.join(timeout=0.05)  # raises the trace of a rank that failed
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                late = sorted(set(range(world)) - set(out))
                raise TimeoutError(f"{fn.__name__}: ranks {late} of {world} took over {timeout_s} s.")
    return [out[r] for r in range(world)]

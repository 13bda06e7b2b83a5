"""What ranks say to each other: gather and sums with gradient, "true on any rank", all of it the identity when alone.

One rule makes the losses of W ranks those of one: every rank evaluates the loss of the *global* batch. The backward of
a gather (or of a sum) adds what all ranks ask of a sample, so its gradient is W times the true one; the data-parallel
wrapper averages parameter gradients over ranks, which divides by W. Parameters then receive exactly the gradient of the
full batch. A plain mean over samples needs no gather: `mean` obeys the same rule with one multiplication.

    gather, sizes (3, 1, 2):   rank 0  [a b c]          every rank  [a b c | d | e f]
                               rank 1  [d]       --->               0     3   4   6     offsets
                               rank 2  [e f]
    backward:                  each rank has a gradient of all six rows; they are summed, and rank 2 keeps rows 4 and 5.
"""

import datetime
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poisonshield.errors import ConfigError, ShapeError

# torch 2.14 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def rank() -> int:
    """This process's number, 0 when there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def map_launcher_environment(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Give torch its RANK, LOCAL_RANK and WORLD_SIZE from the names of Slurm, Open MPI or MPICH; True if it did.

    Only for processes that `srun` or `mpirun` starts directly, one a device: inside torchrun or the deepspeed launcher
    RANK is set already and wins, and with one process there is nothing to number. Raises ConfigError where they are not
    told where to meet.
    """
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")):
        return False
    launcher = next((name for name, names in _LAUNCHERS.items() if _has_started(environ, names)), None)
    if launcher is None:
        return False
    names = _LAUNCHERS[launcher]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise ConfigError(
            f"{launcher} started {environ[names['WORLD_SIZE']]} processes, but without {' and '.join(missing)} they "
            f"cannot meet.\n  {_HOW_TO_EXPORT[launcher]}"
        )
    environ.update({ours: environ[theirs] for ours, theirs in names.items()})
    return True


_LAUNCHERS = {
    "Slurm": {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"},
    "Open MPI": {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    },
    "MPICH": {"RANK": "PMI_RANK", "LOCAL_RANK": "MPI_LOCALRANKID", "WORLD_SIZE": "PMI_SIZE"},
}
"""How each of them calls what torch reads."""


def _has_started(environ: Mapping[str, str], names: Mapping[str, str]) -> bool:
    """Whether a launcher with these names started several processes."""
    return all(name in environ for name in names.values()) and int(environ[names["WORLD_SIZE"]]) > 1


_HOW_TO_EXPORT = {
    "Slurm": "Export them before srun, as launch/slurm/train.sbatch does.",
    "Open MPI": "Give them to all: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..., HOST being that of rank 0.",
    "MPICH": "Give them to all: mpiexec -env MASTER_ADDR HOST -env MASTER_PORT 29500 ..., HOST being that of rank 0.",
}


class _Gather(torch.autograd.Function):
    """All-gather of equal blocks; the backward is the reduce-scatter of the stacked gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * len(x), *x.shape[1:]))
        _all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty((len(grad) // world_size(), *grad.shape[1:]))
        _reduce_scatter(own, grad.contiguous())
        return own


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; each rank's loss may depend on the sum, so the backward is a sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def gather(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Rows of all ranks in rank order, [sum(sizes), ...], with gradient; x [sizes[rank()], ...].

    sizes: rows on each rank (`Batch.rank_sizes`); None promises that all are equal. Unequal blocks are padded to the
    largest, which costs W * max - sum rows of traffic. Raises ShapeError if x does not have the promised rows.
    """
    if sizes is not None and (len(sizes) != world_size() or len(x) != sizes[rank()]):
        raise ShapeError(f"gather got {len(x)} rows on rank {rank()} of {world_size()}; the sizes are {tuple(sizes)}.")
    if _is_alone():
        return x
    if sizes is None or len(set(sizes)) == 1:
        return _Gather.apply(x)
    longest = max(sizes)
    padded = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
    blocks = _Gather.apply(padded).split(longest)
    return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])


def mean(per_sample: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's share of the global mean of per_sample [sizes[rank()]], times W: the ranks' mean is the global one.

    Nothing is sent. With equal sizes it is the plain mean; with unequal ones no rank's samples weigh more than others'.
    """
    if sizes is None:
        return per_sample.mean()
    return per_sample.sum() * (len(sizes) / sum(sizes))


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks, same shape, with gradient. Not in place."""
    return x if _is_alone() else _AllReduceSum.apply(x)


@torch.no_grad()
def all_reduce_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each scalar averaged over ranks, float32, in one message. All ranks bring the same names in the same order."""
    if not values:
        return {}
    packed = torch.stack([v.detach().to(torch.float32).reshape(()) for v in values.values()])
    if not _is_alone():
        dist.all_reduce(packed)
        packed /= world_size()
    return dict(zip(values, packed.unbind(), strict=True))


def _choose_message_device() -> torch.device:
    """Where small messages must live: NCCL sends from the current GPU only, gloo from memory."""
    on_gpu = not _is_alone() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@torch.no_grad()
def any_rank(flag: Tensor | bool, *, patient: bool = False) -> Tensor:
    """True where any rank says true, bool of the shape of `flag`. All ranks must call; reading waits for the device.

    patient: others may come later than the process group's timeout allows, days later.
    """
    flag = torch.as_tensor(flag)
    if _is_alone():
        return flag.bool()
    device = torch.device("cpu") if patient else _choose_message_device()
    votes = flag.to(device=device, dtype=torch.int32, copy=True)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_get_patient_group() if patient else None)
    return votes.bool()


_patient: dict[Any, Any] = {}  # default group -> its patient twin


def _get_patient_group() -> Any:
    """A gloo group of all ranks whose members wait for days; made when first asked for, which all ranks do together."""
    whole = dist.group.WORLD
    if whole not in _patient:
        _patient.clear()
        _patient[whole] = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    return _patient[whole]


def barrier() -> None:
    """Wait until every rank is here."""
    if not _is_alone():
        dist.barrier()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The `value` of rank `source` on every rank. Sent pickled between our own processes: small records only."""
    if _is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_choose_message_device())
    return box[0]

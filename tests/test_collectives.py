"""Losses and gradients of W ranks against one process that holds the whole batch, in float64."""

import pytest
import torch
from dist import run_dist
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.errors import ConfigError, ShapeError

EQUAL = {1: (4,), 2: (3, 3), 4: (2, 2, 2, 2)}
UNEQUAL = {1: (5,), 2: (4, 1), 4: (3, 0, 2, 1)}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def data(total: int) -> Tensor:
    return torch.randn(total, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(total))


def contrast(z: Tensor) -> Tensor:
    """A loss in which every sample meets every other one."""
    z = z / z.norm(dim=1, keepdim=True)
    logits = z @ z.T - 1e9 * torch.eye(len(z), dtype=z.dtype)
    return logits.logsumexp(1).mean() - z[:, 0].pow(2).sum()


def centred(z: Tensor, total: Tensor, count: int) -> Tensor:
    """A loss that reads batch statistics: `total` is the sum of z over the batch."""
    return (z - total / count).pow(2).sum(1).sin()


def expected(sizes: tuple[int, ...]) -> dict[str, tuple[float, list[float]]]:
    """Loss and parameter gradient of each check, one process, whole batch."""
    x, out = data(sum(sizes)), {}
    for name in ("gather", "mean", "sum"):
        net = network()
        z = net(x)
        if name == "gather":
            value = contrast(z)
        elif name == "mean":
            value = z.pow(2).sum(1).mean()
        else:
            value = centred(z, z.sum(0), len(x)).mean()
        value.backward()
        out[name] = (value.item(), torch.cat([p.grad.flatten() for p in net.parameters()]).tolist())
    return out


def measured(rank: int, world: int, sizes: tuple[int, ...], tell_sizes: bool) -> dict[str, tuple[float, list[float]]]:
    """The same on one of several ranks, gradients averaged as a data-parallel wrapper does."""
    start = sum(sizes[:rank])
    x, told, out = data(sum(sizes))[start : start + sizes[rank]], sizes if tell_sizes else None, {}
    for name in ("gather", "mean", "sum"):
        net = network()
        z = net(x)
        if name == "gather":
            loss = contrast(collectives.gather(z, told))
        elif name == "mean":
            loss = collectives.mean(z.pow(2).sum(1), told)
        else:
            loss = collectives.mean(centred(z, collectives.all_reduce_sum(z.sum(0)), sum(sizes)), told)
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.distributed.all_reduce(grad)
        value = loss.detach().clone()
        torch.distributed.all_reduce(value)
        out[name] = (value.item() / world, (grad / world).tolist())
    return out


def small_talk(rank: int, world: int) -> dict[str, object]:
    """Every small message once, and what a wrong promise does."""
    talk: dict[str, object] = {"rank": collectives.rank(), "world": collectives.world_size()}
    talk["any"] = collectives.any_rank(torch.tensor([rank == 1, False, True])).tolist()
    talk["any_bool"] = bool(collectives.any_rank(rank == world - 1))
    means = collectives.all_reduce_mean({"a": torch.tensor(float(rank)), "b": torch.tensor(2)})
    talk["mean"] = {name: value.item() for name, value in means.items()}
    talk["object"] = collectives.broadcast_object({"from": rank}, source=world - 1)
    untouched = torch.tensor([1.0 + rank])
    talk["sum"], talk["untouched"] = collectives.all_reduce_sum(untouched).item(), untouched.item()
    ints = collectives.gather(torch.full((rank + 1,), rank), tuple(range(1, world + 1)))
    talk["ints"] = ints.tolist()
    try:
        collectives.gather(torch.zeros(rank + 5, 2), (1,) * world)
    except ShapeError as error:
        talk["error"] = str(error)
    collectives.barrier()
    return talk


def everything(rank: int, world: int) -> dict[str, object]:
    return {
        "equal": measured(rank, world, EQUAL[world], tell_sizes=False),
        "told": measured(rank, world, EQUAL[world], tell_sizes=True),
        "unequal": measured(rank, world, UNEQUAL[world], tell_sizes=True),
        "talk": small_talk(rank, world),
    }


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_gradients_of_many_ranks_are_those_of_one(world: int) -> None:
    answers = run_dist(everything, world)
    for kind, sizes in (("equal", EQUAL), ("told", EQUAL), ("unequal", UNEQUAL)):
        oracle = expected(sizes[world])
        for rank, answer in enumerate(answers):
            for check, (loss, grad) in answer[kind].items():
                assert abs(loss - oracle[check][0]) < 1e-6, (kind, check, rank)
                difference = (torch.tensor(grad) - torch.tensor(oracle[check][1])).abs().max()
                assert difference < 1e-6, (kind, check, rank)
    for rank, talk in enumerate(answer["talk"] for answer in answers):
        assert (talk["rank"], talk["world"]) == (rank, world)
        assert talk["any"] == [world > 1, False, True]
        assert talk["any_bool"] is True
        assert talk["mean"] == {"a": (world - 1) / 2, "b": 2.0}
        assert talk["object"] == {"from": world - 1}
        assert talk["sum"] == sum(1.0 + r for r in range(world)) and talk["untouched"] == 1.0 + rank
        assert talk["ints"] == [r for r in range(world) for _ in range(r + 1)]
        assert f"rank {rank} of {world}" in talk["error"]


def test_alone_every_collective_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.gather(x) is x and collectives.gather(x, (3,)) is x and collectives.all_reduce_sum(x) is x
    assert collectives.mean(x[:, 0]) == x[:, 0].mean() and (collectives.rank(), collectives.world_size()) == (0, 1)
    assert bool(collectives.any_rank(True)) and not collectives.any_rank(torch.tensor(False))
    assert collectives.broadcast_object("a") == "a" and collectives.all_reduce_mean({}) == {}
    collectives.barrier()


SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "12000"}


def test_slurm_numbers_become_torch_numbers() -> None:
    environ = dict(SLURM)
    assert collectives.map_launcher_environment(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "4")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SLURM, "RANK": "0"},
        {**SLURM, "WORLD_SIZE": "8"},
        {**SLURM, "TORCHELASTIC_RUN_ID": "none"},
        {**SLURM, "SLURM_NTASKS": "1"},
        {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"},
    ],
    ids=["no slurm", "rank is set", "world size is set", "inside torchrun", "one task", "an allocation without srun"],
)
def test_slurm_numbers_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not collectives.map_launcher_environment(environ)
    assert environ == before


def test_slurm_tasks_without_a_meeting_point_are_refused() -> None:
    environ = {k: v for k, v in SLURM.items() if not k.startswith("MASTER")}
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT"):
        collectives.map_launcher_environment(environ)

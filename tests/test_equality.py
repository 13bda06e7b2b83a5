"""However many processes share the work, and whatever shards it, VESPR's losses are those of one process."""

import itertools

import pytest
import torch
from dist import run_dist
from runs import MINI, apart, fit, logged, opened, smooth

from poisonshield import collectives
from poisonshield.engine.processes import processes
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import build_method, build_stream, spread_batch_norm

# 2 ranks of 8. At lr 0.001 rounding grows less than tenfold in 20 steps; at 0.1 it does so in each of the first ones.
SHORT = (
    "data.batch_size=16", "engine.max_steps=5", "engine.log_every_steps=1", "engine.device=cpu",
    "schedule.name=constant", "optimizer.lr=0.001", "model.widths=[8,16,16,32]", "method.hidden=64", "method.out=64",
)  # fmt: skip
ATTACK = ("defenses.0.eps=4/255", "defenses.0.attack.step_size=0.6/255", "defenses.0.attack.steps=4")
NO_ATTACK = ("defenses.0.attack_views=[]",)
BACKENDS = {
    "plain": (),
    **{f"zero{s}": ("engine.backend=deepspeed", f"engine.zero_stage={s}") for s in range(4)},
}


def losses(folder, overrides):
    """The loss of each step of a run."""
    fit(folder, [*SHORT, *overrides], change=smooth)
    return logged(folder)


def both(folder, overrides):
    """(losses with attack, losses without)."""
    return losses(f"{folder}-attack", overrides + ATTACK), losses(f"{folder}-calm", overrides + NO_ATTACK)


def exact_losses(rank, world, lr):
    """The losses of 20 steps of the shipped network, ReLU and all, in float64, where no rounding reaches a kink."""
    run = read_experiment(MINI, [*SHORT, *ATTACK, "method.hidden=64"])
    data, training = opened()
    with processes(run.settings.engine, seed=run.seed) as device:
        method = spread_batch_norm(run, build_method(run, data.num_classes).double(), device).train()
        stream = build_stream(run, training, method, device)
        optimizer = torch.optim.SGD(method.parameters(), lr=lr, momentum=0.9)
        seen = []
        for batch in itertools.islice(stream, 20):
            optimizer.zero_grad()
            output = method(batch.replace(views=tuple(v.double() for v in batch.views)))
            output.loss.backward()
            for p in method.parameters():  # what DistributedDataParallel does, written out
                p.grad = collectives.all_reduce_sum(p.grad) / world
            optimizer.step()
            seen.append(float(collectives.all_reduce_sum(output.loss.detach()) / world))
    return seen


def every_backend(rank, world, folder, more):
    """On two ranks, one after the other: {backend: (losses with attack, losses without)}."""
    return {name: both(f"{folder}/{name}", over + more) for name, over in BACKENDS.items()}


def everything(rank, world, folder):
    """On two ranks that are started once: every backend, batch norm of each rank alone, and losses in float64."""
    return {
        "backends": every_backend(rank, world, folder, ()),
        "local norm": losses(f"{folder}/local", NO_ATTACK + ("model.batch_norm=local",)),
        "exact": exact_losses(rank, world, 0.1),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return both(tmp_path_factory.mktemp("alone") / "one", ())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return run_dist(everything, 2, str(tmp_path_factory.mktemp("shared")), deepspeed=True, timeout_s=400)[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", BACKENDS)
def test_losses_of_two_ranks_are_those_of_one(name, alone, shared):
    (attack, calm), (attack_2, calm_2) = alone, shared["backends"][name]
    assert len(attack) == 5 and len(set(attack)) == 5
    print(f"{name:6} attack {apart(attack, attack_2):.1e} calm {apart(calm, calm_2):.1e}")
    assert apart(calm, calm_2) < 1e-5
    assert apart(attack, attack_2) < 1e-4


@pytest.mark.dist
def test_relu_network_at_a_training_rate_agrees_in_float64(shared):
    alone, two = exact_losses(0, 1, 0.1), shared["exact"]
    assert len(set(alone)) == 20 and apart(alone[:5], two[:5]) < 1e-9 and apart(alone, two) < 1e-3


@pytest.mark.dist
@pytest.mark.slow
def test_losses_stay_together_for_twenty_steps(tmp_path):
    longer = ("engine.max_steps=20", "data.batch_size=64")  # of 8 a rank, batch norm lets rounding grow faster
    attack, calm = both(tmp_path / "one", longer)
    two = run_dist(every_backend, 2, str(tmp_path), longer, deepspeed=True, timeout_s=900)[0]
    print({name: (apart(attack, a), apart(calm, c)) for name, (a, c) in two.items()})
    for attack_2, calm_2 in two.values():
        assert len(attack_2) == 20 and apart(calm, calm_2) < 1e-5
        assert apart(attack[:5], attack_2[:5]) < 1e-4 and apart(attack, attack_2) < 1e-3


@pytest.mark.dist
def test_batch_norm_of_each_rank_alone_breaks_it(alone, shared):
    assert apart(alone[1], shared["local norm"]) > 1e-3

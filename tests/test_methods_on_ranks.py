"""However many processes share the work, every self-supervised method inside VESPR has the losses of one process.

One process, two gloo ranks under DistributedDataParallel, two under DeepSpeed ZeRO 2; all methods in one start of two
processes. The network, rate and activation are those of test_equality.py, and so are the tolerances, stated before any
comparison: 1e-5 without attack, 1e-4 with attack over 5 steps, 1e-3 over 20; as a part of the loss where that is above
1, since float32 resolves a loss of 60 to 4e-6 only.
"""

import itertools

import pytest
import torch
from dist import run_dist
from runs import MINI, SSL_METHODS, choose_method, fit, logged, opened, smooth
from test_equality import NO_ATTACK, SHORT

from poisonshield import collectives
from poisonshield.engine.processes import processes
from poisonshield.runs import read_experiment
from poisonshield.runs.classify import build_method, build_stream, spread_batch_norm

CASES = {name: (name, ()) for name in SSL_METHODS} | {"byol directset": ("byol", ("method.directset=0.5",))}
# For methods that have them. At this momentum a target that stood still would show: by 2e-5 in 3 steps, 1e-3 in 20.
OPTIONS = {"hidden": 64, "out": 64, "predictor": 32, "bottleneck": 32, "momentum": 0.5}
ATTACK = ("defenses.0.eps=4/255", "defenses.0.attack.step_size=1/255", "defenses.0.attack.steps=3")
BACKENDS = {"plain": (), "zero2": ("engine.backend=deepspeed", "engine.zero_stage=2")}
ALL = {backend: tuple(CASES) for backend in BACKENDS}
# Under ZeRO 2 at first only those with weights or queues that no optimizer moves; the others with -m slow.
QUICK = ALL | {"zero2": ("byol", "dino", "moco")}
# Gradients at the start are 1 to 20 long, but Barlow's is 300: for it 0.001 would be a training rate, at which one
# process in float32 leaves its own float64 by 2e-5 in 4 steps.
RATES = {"barlow": 1e-5}


def settings(case, steps, attack):
    """The overrides of a run."""
    name, more = CASES[case]
    rate = (f"optimizer.lr={RATES[case]}",) if case in RATES else ()
    method = (choose_method(name, **OPTIONS), *more)
    return (*SHORT, *method, *rate, *(ATTACK if attack else NO_ATTACK), f"engine.max_steps={steps}")


def losses(folder, case, steps, more=()):
    """(with attack, without) of each step."""
    found = []
    for attack in (True, False):
        fit(f"{folder}/{attack}", (*settings(case, steps, attack), *more), change=smooth)
        found.append(logged(f"{folder}/{attack}"))
    return tuple(found)


def exact(case, steps):
    """The losses of the shipped method, ReLU and all, in float64 at a hundred times the rate, with attack."""
    run = read_experiment(MINI, [*settings(case, steps, True), "run.dir=unused"])
    data, training = opened()
    with processes(run.settings.engine, seed=run.seed) as device:
        method = spread_batch_norm(run, build_method(run, data.num_classes).double(), device).train()
        optimizer = torch.optim.SGD(method.parameters(), lr=100 * RATES.get(case, 0.001), momentum=0.9)
        seen = []
        for batch in itertools.islice(build_stream(run, training, method, device), steps):
            optimizer.zero_grad()
            output = method(batch.replace(views=tuple(v.double() for v in batch.views)))
            output.loss.backward()
            for p in method.parameters():  # what DistributedDataParallel does, written out
                if p.grad is not None:
                    p.grad = collectives.all_reduce_sum(p.grad) / collectives.world_size()
            optimizer.step()
            method.after_step(len(seen) / steps)
            seen.append(float(collectives.all_reduce_sum(output.loss.detach()) / collectives.world_size()))
    return seen


def everything(rank, world, folder, steps, cases, exactly):
    """{backend: {case: losses}} of two ranks, and under "exact" those in float64 of the cases in `exactly`."""
    found = {
        backend: {case: losses(f"{folder}/{backend}-{case}", case, steps, more) for case in cases[backend]}
        for backend, more in BACKENDS.items()
    }
    return found | {"exact": {case: exact(case, 3) for case in exactly}}


def compared(folder, steps, cases, exactly):
    """(one process's losses by case, two ranks' by backend and case)."""
    one = {case: losses(f"{folder}/one-{case}", case, steps) for case in CASES}
    return one, run_dist(everything, 2, str(folder), steps, cases, exactly, deepspeed=True, timeout_s=2400)[0]


def apart(a, b):
    """The largest difference of two runs' losses, as a part of the loss where that is above 1."""
    return max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return compared(tmp_path_factory.mktemp("ranks"), 3, QUICK, tuple(RATES))


@pytest.mark.dist
@pytest.mark.parametrize(("backend", "case"), [(backend, case) for backend in BACKENDS for case in QUICK[backend]])
def test_method_on_two_ranks_has_the_losses_of_one_process(case, backend, short):
    (attack, calm), (attack_2, calm_2) = short[0][case], short[1][backend][case]
    print(f"{case:15} {backend:6} attack {apart(attack, attack_2):.1e} calm {apart(calm, calm_2):.1e}")
    assert len(set(attack)) == 3 and attack != calm
    assert apart(calm, calm_2) < 1e-5 and apart(attack, attack_2) < 1e-4


@pytest.mark.dist
@pytest.mark.parametrize("case", RATES)
def test_method_with_a_rate_of_its_own_agrees_in_float64(case, short):
    far = apart(exact(case, 3), short[1]["exact"][case])
    print(f"{case:15} float64 {far:.1e}")
    assert far < 1e-9


@pytest.mark.dist
@pytest.mark.slow
def test_methods_stay_together_for_twenty_steps_and_in_float64(tmp_path):
    one, two = compared(tmp_path, 20, ALL, tuple(CASES))
    far = []
    for backend, case in itertools.product(BACKENDS, CASES):
        (attack, calm), (attack_2, calm_2) = one[case], two[backend][case]
        first, whole, quiet = apart(attack[:5], attack_2[:5]), apart(attack, attack_2), apart(calm, calm_2)
        print(f"{case:15} {backend:6} attack {first:.1e} in 5, {whole:.1e} in 20, calm {quiet:.1e}")
        if not (first < 1e-4 and whole < 1e-3 and quiet < 1e-5):
            far.append((backend, case))
    for case in CASES:
        sharp = apart(exact(case, 3), two["exact"][case])
        print(f"{case:15} float64 {sharp:.1e}")
        if not sharp < 1e-9:
            far.append(("float64", case))
    assert len(attack) == 20 and not far

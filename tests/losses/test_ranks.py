"""Every loss over 1, 2 and 4 ranks: value and parameters' gradient are those of one process, float32 to 1e-5."""

import functools

import pytest
import torch
import torch.nn.functional as F
from dist import run_dist

from poisonshield import collectives
from poisonshield.losses.barlow import barlow
from poisonshield.losses.cosine import negative_cosine
from poisonshield.losses.dino import dino, move_centre
from poisonshield.losses.infonce import infonce
from poisonshield.losses.mec import mec
from poisonshield.losses.vicreg import vicreg

ROWS, WIDTH = 12, 6
SIZES = {1: [(12,)], 2: [(6, 6), (7, 5)], 4: [(3, 3, 3, 3), (5, 1, 4, 2)]}


def dino_with_centre(online, target, *, rank_sizes):
    """The loss after one move of the centre, so that a centre which differs between ranks would show."""
    centre = move_centre(torch.zeros(WIDTH), target, rank_sizes=rank_sizes)
    return dino(online, target, centre, rank_sizes=rank_sizes)


def cross_entropy(online, target, *, rank_sizes):
    """What VESPR adds: no gather at all."""
    labels = torch.arange(ROWS) % WIDTH
    first = sum(rank_sizes[: collectives.rank()])
    mine = labels[first : first + len(online[0])]
    return collectives.mean(sum(F.cross_entropy(z, mine, reduction="none") for z in online) / len(online), rank_sizes)


LOSSES = {
    "infonce none": (infonce, {"same_view": "none"}),
    "infonce others": (infonce, {"same_view": "others"}),
    "infonce all": (infonce, {"same_view": "all"}),
    "infonce margin": (infonce, {"same_view": "others", "margin": 0.1}),
    "cosine": (negative_cosine, {}),
    "barlow": (barlow, {}),
    "barlow legacy": (barlow, {"legacy": True}),
    "vicreg": (vicreg, {}),
    "vicreg legacy": (vicreg, {"legacy": True}),
    "mec": (mec, {}),
    "mec legacy": (mec, {"terms": 2, "coding_length": True}),
    "dino": (dino_with_centre, {}),
    "cross-entropy": (cross_entropy, {}),
}


def every_loss(rank, world, sizes):
    """{loss and target: (mean loss over ranks, gradient of the projector and of the target's projector)}."""
    draw = torch.Generator().manual_seed(3)
    x = [torch.randn(ROWS, 5, generator=draw) for _ in range(2)]
    weights = [torch.randn(5, WIDTH, generator=draw) for _ in range(2)]
    first = sum(sizes[:rank])
    mine = [v[first : first + sizes[rank]] for v in x]
    answers = {}
    for name, (loss, settings) in LOSSES.items():
        for target in ("itself", "other", "stopped"):
            own, theirs = (w.clone().requires_grad_() for w in weights)
            p = tuple(v @ own for v in mine)
            m = {
                "itself": p,
                "other": tuple(v @ theirs for v in mine),
                "stopped": tuple((v @ theirs).detach() for v in mine),
            }
            value = loss(p, m[target], **settings, rank_sizes=tuple(sizes))
            value.backward()
            grads = [
                collectives.all_reduce_sum(w.grad if w.grad is not None else torch.zeros_like(w)) / world
                for w in (own, theirs)
            ]
            mean = float(collectives.all_reduce_sum(value.detach()) / world)
            answers[f"{name}, target {target}"] = (mean, [g.tolist() for g in grads])
    return answers


def everything(rank, world):
    """What the tests ask of a number of ranks, started once: every split of the samples, and what InfoNCE sends."""
    return [every_loss(rank, world, sizes) for sizes in SIZES[world]], infonce_talk(rank, world) if world == 2 else None


@functools.cache
def answers(world):
    return run_dist(everything, world)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradient_do_not_depend_on_ranks(world):
    alone = every_loss(0, 1, SIZES[1][0])
    for splits, _ in answers(world):
        for split in splits:
            for name, (value, grads) in split.items():
                expected, expected_grads = alone[name]
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-5), name
                for g, e in zip(grads, expected_grads, strict=True):
                    scale = max(1.0, torch.tensor(e).abs().max().item())
                    assert (torch.tensor(g) - torch.tensor(e)).abs().max() < 1e-5 * scale, name


def infonce_talk(rank, world):
    """Names of the collectives in forward and backward of InfoNCE, gradient on both sides, and of cross-entropy."""
    seen = []
    for name in ("_all_gather", "_reduce_scatter"):
        function = getattr(collectives, name)
        setattr(collectives, name, lambda *a, f=function, n=name: (seen.append(n), f(*a))[1])
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    loss = infonce((x, 2 * x.roll(1, 1)), rank_sizes=(6,) * world)
    forward, seen[:] = list(seen), []
    loss.backward()
    backward, seen[:] = list(seen), []
    cross_entropy((x,), None, rank_sizes=(6,) * world).backward()
    return forward, backward, list(seen)


@pytest.mark.dist
def test_infonce_sends_nothing_in_the_backward_pass_and_cross_entropy_nothing_at_all():
    for _, (forward, backward, ce) in answers(2):
        assert forward == ["_all_gather"] * 4  # two views' keys, two pairs' log-denominators
        assert backward == [] and ce == []

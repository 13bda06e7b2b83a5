"""Auto-PGD beside AutoAttack's own code: the same points step by step, and the same robust accuracy."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from poisonshield.attacks import APGD, PGD, budget
from poisonshield.attacks.apgd import checkpoints
from poisonshield.losses.dlr import dlr
from poisonshield.random import KeyedRandom, sample_ids

torchattacks = pytest.importorskip("torchattacks")

EPS = {"linf": 1 / 32, "l2": 0.35}
LOSSES = {"ce": lambda scores, y: F.cross_entropy(scores, y, reduction="none"), "dlr": dlr}
TOLERANCE = 2.0  # percent of robust accuracy, two of a hundred samples: random starts differ


@pytest.fixture(autouse=True)
def double():
    """float64 throughout, or else their record of losses is rounded to float32 and ties where ours does not."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def problem(size=100):
    """A network that has learned five blurred classes, and test pictures of them. float64."""
    draw = torch.Generator().manual_seed(0)
    centre = torch.rand(5, 3, 8, 8, generator=draw, dtype=torch.float64)

    def pictures(count):
        y = torch.arange(count) % 5
        noise = torch.rand(count, 3, 8, 8, generator=draw, dtype=torch.float64)
        return 0.2 * centre[y] + 0.8 * noise, y

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = pictures(400)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), *pictures(size)


def rng(size, seed=0):
    return KeyedRandom(seed, sample_ids([f"k{i}" for i in range(size)]))


class Recorder(nn.Module):
    """A model that remembers the pixels that it was shown."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def start_of_theirs(norm, x, seed=0):
    """Where their code begins: it draws from torch's generator and goes to the surface of the ball."""
    torch.manual_seed(seed)
    if norm == "linf":
        t = 2 * torch.rand(x.shape) - 1
        t = t / t.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    else:
        t = torch.randn(x.shape)
        t = t / (t.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)
    return (x + EPS[norm] * t).clamp(0, 1)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_visits_the_same_points(norm, loss):
    model, x, y = problem()
    theirs, ours = Recorder(model), Recorder(model)
    attack = torchattacks.APGD(theirs, norm=norm.capitalize(), eps=EPS[norm], steps=100, loss=loss)
    torch.manual_seed(0)
    best, right, _, fooling = attack.attack_single_run(x, y)

    def objective(v):
        return LOSSES[loss](ours(v), y)

    def run(**more):
        start = start_of_theirs(norm, x)
        return APGD(steps=100)(objective, x, budget(norm, EPS[norm]), rng(len(x)), start=start, **more)

    found = run()
    assert len(theirs.seen) == len(ours.seen) == 101
    alike = comparable(objective, ours.seen)
    for a, b in zip(ours.seen[:101], theirs.seen, strict=True):
        torch.testing.assert_close(a[alike], b[alike], atol=1e-7, rtol=0)
    torch.testing.assert_close(found[alike], best[alike], atol=1e-7, rtol=0)
    kept = run(success=lambda v: model(v).argmax(1) != y)
    assert 0 < (~right).sum() < len(x)
    expected = torch.where(right.view(-1, 1, 1, 1), best, fooling)
    torch.testing.assert_close(kept[alike], expected[alike], atol=1e-7, rtol=0)


def comparable(objective, points):
    """bool [B]: samples whose path depends on neither of two accidents.

    At the first step their code compares the loss with 0, not with the start's; left out are those few that it counts
    otherwise and that would then be judged otherwise. And where the true class is third, the ratio is 1 whatever the
    pixels are: its gradient is rounding noise, of which an l2 step makes a full length.
    """
    with torch.no_grad():
        losses = torch.stack([objective(x) for x in list(points)])
    first, rises = losses[1], (losses[2:23] > losses[1:22]).sum(0)
    counted = (rises + (first > losses[0]) > 16.5) == (rises + (first > 0) > 16.5)
    flat = ((losses - 1).abs() < 1e-9).any(0)
    assert (counted & ~flat).double().mean() > 0.6
    return counted & ~flat


def accuracy(model, x, y):
    return 100 * (model(x).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_accuracy_is_that_of_autoattack(norm, loss, steps):
    """Other random starts and, at these lengths, other checkpoints; with restarts on both sides."""
    model, x, y = problem()
    attack = torchattacks.APGD(model, norm=norm.capitalize(), eps=EPS[norm], steps=steps, loss=loss, n_restarts=2)
    ours = APGD(steps=steps, restarts=2)(
        lambda v: LOSSES[loss](model(v), y),
        x,
        budget(norm, EPS[norm]),
        rng(len(x)),
        success=lambda v: model(v).argmax(1) != y,
    )
    robust = accuracy(model, ours, y)
    assert robust == pytest.approx(accuracy(model, attack(x, y), y), abs=TOLERANCE)
    assert 5 < robust < accuracy(model, x, y) - 20


def test_targeted_ratio_finds_what_the_targeted_attack_of_autoattack_finds():
    """One ascent for each other class; a sample stays right only if every one fails."""
    model, x, y = problem()
    theirs = torchattacks.APGDT(model, norm="Linf", eps=EPS["linf"], steps=50, n_classes=5)(x, y)
    stays = torch.ones(len(x), dtype=torch.bool)
    for shift in range(1, 5):
        target = (y + shift) % 5
        found = APGD(steps=50)(
            lambda v, target=target: dlr(model(v), y, target=target),
            x,
            budget("linf", EPS["linf"]),
            rng(len(x)),
            success=lambda v: model(v).argmax(1) != y,
        )
        stays &= model(found).argmax(1) == y
    assert 100 * stays.double().mean().item() == pytest.approx(accuracy(model, theirs, y), abs=TOLERANCE)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_climbs_as_high_as_pgd_with_a_good_step_and_higher_than_with_a_bad_one(norm):
    model, x, y = problem()
    ball = budget(norm, EPS[norm])

    def objective(v):
        return F.cross_entropy(model(v), y, reduction="none")

    ours = objective(APGD(steps=40)(objective, x, ball, rng(len(x))))
    good, short = (
        objective(PGD(steps=40, step_size=EPS[norm] / part)(objective, x, ball, rng(len(x)))) for part in (4, 200)
    )
    assert ours.mean() > 0.99 * good.mean() and ours.mean() > 1.05 * short.mean()


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10] and checkpoints(1) == [1] and checkpoints(0) == [0]


def test_more_restarts_never_lose_a_sample():
    model, x, y = problem()

    def fooled(restarts):
        found = APGD(steps=5, restarts=restarts)(
            lambda v: F.cross_entropy(model(v), y, reduction="none"),
            x,
            budget("linf", EPS["linf"]),
            rng(len(x)),
            success=lambda v: model(v).argmax(1) != y,
        )
        return model(found).argmax(1) != y

    assert (fooled(3) >= fooled(1)).all() and fooled(1).any()


def test_restarts_end_where_every_sample_is_fooled():
    model, x, y = problem()
    counted = Recorder(model)
    APGD(steps=3, restarts=50)(
        lambda v: F.cross_entropy(counted(v), y, reduction="none"),
        x,
        budget("linf", 0.1),
        rng(len(x)),
        success=lambda v: torch.ones(len(v), dtype=torch.bool),
    )
    assert len(counted.seen) == 4


def test_a_loss_that_never_changes_halves_the_step_at_checkpoints_and_goes_back():
    """A closed form: on a flat loss the steps are 0 for lack of a gradient, and the start is what comes out."""
    x = torch.full((3, 1, 2, 2), 0.5)
    out = APGD(steps=30, random_start=False)(lambda v: (0 * v).sum((1, 2, 3)), x, budget("l2", 0.3), rng(3))
    assert torch.equal(out, x)

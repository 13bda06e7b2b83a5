"""Poisons that are trained: steps against naive loops in float64, what they reach, and going on to the bit."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from poisonshield.attacks import Linf
from poisonshield.batch import Batch
from poisonshield.cli import main
from poisonshield.errors import ConfigError, DataError, PoisonShieldError
from poisonshield.poisons.em import EM, average_by_class
from poisonshield.poisons.hypo import Hypo
from poisonshield.poisons.learned import progress as progress_file
from poisonshield.poisons.learned.crafting import shift
from poisonshield.poisons.learned.pictures import collect, make_table
from poisonshield.poisons.learned.surrogate import Surrogate, SurrogateConfig
from poisonshield.poisons.rem_lite import REMLite
from poisonshield.poisons.tap import TAP
from poisonshield.random import KeyedRandom, sample_ids

CPU, CLASSES, SIDE = torch.device("cpu"), 3, 8
MODEL = {"name": "resnet_mini", "stem_stride": 2, "widths": (4, 4, 8, 8)}
SMALL = {"model": MODEL, "batch_size": 16, "lr": 0.05}


def images(count=30, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw) / 255
    return Batch(tuple(f"k{i}" for i in range(count)), x, y=torch.arange(count) % CLASSES)


def make(cls, *, seed=0, **settings):
    settings = {"surrogate": SMALL, **settings}
    return cls(cls.Config(**settings), num_classes=CLASSES, image_size=(SIDE, SIDE), seed=seed)


def linear(seed=0, scale=0.05):
    """A surrogate that is one matrix, in float64."""
    surrogate = Surrogate(SurrogateConfig(**SMALL), num_classes=CLASSES, seed=seed, device=CPU)
    surrogate.encoder, surrogate.head = nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        surrogate.head.weight.copy_(torch.randn(surrogate.head.weight.shape, generator=draw) * scale)
    return surrogate.double().eval()


def ready(poison, batch):
    """The poison with a table of zeros for the pictures, which are given too, in the order of ids."""
    pictures = collect([batch], CPU, poison.name)
    poison.ids, poison.table = pictures.ids, torch.zeros((len(pictures), 3, SIDE, SIDE), dtype=torch.int8)
    x, y = pictures.read(torch.arange(len(pictures)))
    return pictures, x.double(), y


def step_by_hand(surrogate, x, y, delta, *, sign, steps, size, eps, view=lambda x, step: x):
    """Sign steps on the cross-entropy, from its definition; sign -1 makes it smaller."""
    for step in range(steps):
        leaf = (x + delta).clone().requires_grad_()
        log_p = surrogate(view(leaf, step)).log_softmax(1)
        loss = -log_p[torch.arange(len(y)), y].sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        delta = (delta + sign * size * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x  # what is kept is what can be shown
    return delta


# em


def test_em_sweep_is_the_naive_loop_in_float64_and_goes_on_from_the_stored_noise():
    poison, surrogate = make(EM, steps=5), linear()
    _, x, y = ready(poison, images())
    rows, delta = torch.arange(len(x)), torch.zeros_like(x)
    for _ in range(2):
        delta = step_by_hand(surrogate, x, y, delta, sign=-1, steps=5, size=0.8 / 255, eps=8 / 255)
        delta = (delta * 255).round() / 255  # kept as levels
        poison.improve(surrogate, x, rows, y)
        assert torch.equal(poison.table, (delta * 255).round().to(torch.int8))
    assert poison.table.abs().max() == 8


def test_em_on_two_classes_of_a_linear_model_ends_at_eps_times_the_sign_of_the_weights():
    poison, surrogate = make(EM, steps=20), linear()
    with torch.no_grad():
        surrogate.head.bias[2] = -1e9  # two classes are left, and the gradient is a multiple of w_other - w_y
    _, x, y = ready(poison, images())
    some = y < 2
    x, y, rows = x[some] * 0 + 0.5, y[some], torch.arange(len(y))[some]
    poison.improve(surrogate, x, rows, y)
    w = surrogate.head.weight.detach()
    wanted = 8 * (w[y] - w[1 - y]).sign().view(-1, 3, SIDE, SIDE)
    assert torch.equal(poison.table[rows].double(), wanted)


def test_em_by_class_takes_the_mean_of_its_pictures_after_each_batch():
    poison, surrogate = make(EM, per="class", steps=1), linear()
    poison.table = torch.zeros((CLASSES, 3, SIDE, SIDE), dtype=torch.int8)
    poison.begin()
    assert poison.noise.abs().max() <= 8 / 255 and poison.noise.std() > 3 / 255
    poison.noise = poison.noise.double()
    batch = images()
    x, y, before = batch.x.double()[:16], batch.y[:16], poison.noise.clone()
    start = (x + before[y]).clamp(0, 1) - x
    moved = step_by_hand(surrogate, x, y, start, sign=-1, steps=1, size=0.8 / 255, eps=8 / 255)
    wanted = torch.stack([moved[y == k].mean(0) for k in range(CLASSES)]).clamp(-8 / 255, 8 / 255)
    poison.improve(surrogate, x, torch.arange(16), y)
    torch.testing.assert_close(poison.noise, wanted, rtol=0, atol=1e-12)
    alone = average_by_class(moved[y == 1], y[y == 1], before)
    torch.testing.assert_close(alone[1], moved[y == 1].mean(0))
    assert torch.equal(alone[0], before[0])


def test_em_rounds_are_steps_of_sgd_then_a_sweep_until_the_error_is_small():
    settings = {"steps": 2, "train_steps": 3, "max_rounds": 2, "stop": 0.0}
    batch, poison = images(), make(EM, **settings)
    poison.fit([batch])
    pictures = collect([batch], CPU, "em")
    net = Surrogate(SurrogateConfig(**SMALL), num_classes=CLASSES, seed=0, device=CPU)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    x, y = pictures.read(torch.arange(len(pictures)))
    delta, step = torch.zeros_like(x), 0
    for _ in range(2):
        for _ in range(3):
            rows, step = pictures.shuffled(16, 0, step), step + 1
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(net((x + delta)[rows]), y[rows]).backward()
            optimizer.step()
        net.eval()
        delta = step_by_hand(net, x, y, delta, sign=-1, steps=2, size=0.8 / 255, eps=8 / 255)
        delta = (delta * 255).round() / 255
    same = (poison.table == (delta * 255).round()).float().mean()
    assert same > 0.99  # signs of gradients near zero may turn with the order of additions


@pytest.mark.parametrize("per", ["sample", "class"])
def test_em_ends_with_a_surrogate_that_is_right_about_the_poisoned_pictures(per, caplog):
    poison = make(EM, per=per, max_rounds=60, share=1.0, steps=5, surrogate={**SMALL, "batch_size": 30})
    with caplog.at_level("INFO"):
        poison.fit([images()])
    last = [r.getMessage() for r in caplog.records if "surrogate's error" in r.getMessage()][-1]
    assert float(last.split()[-1]) < poison.stop_error
    assert poison.table.abs().max() == 8
    assert len(poison.table) == (30 if per == "sample" else CLASSES)


# rem_lite


def test_rem_lite_starts_at_adversarial_noise_that_goes_on_over_rounds():
    poison, surrogate = make(REMLite), linear()
    _, x, y = ready(poison, images())
    poison.adversary = torch.zeros_like(poison.table)
    bad = torch.zeros_like(x)
    for _ in range(2):
        bad = step_by_hand(surrogate, x, y, bad, sign=1, steps=5, size=4 / 5 / 255, eps=4 / 255)
        good = step_by_hand(surrogate, x, y, bad, sign=-1, steps=5, size=8 / 5 / 255, eps=8 / 255)
        bad = (bad * 255).round() / 255
        poison.improve(surrogate, x, torch.arange(len(x)), y)
        assert torch.equal(poison.adversary, (bad * 255).round().to(torch.int8))
        assert torch.equal(poison.table, (good * 255).round().to(torch.int8))


# tap and hypo


def shift_by_hand(x, rng, padding):
    u = rng.uniform("shift", 3)
    out = []
    for i, picture in enumerate(x):
        padded = F.pad(picture, [padding] * 4)
        top, left = (int(v * (2 * padding + 1)) for v in u[i, :2])
        cut = padded[:, top : top + SIDE, left : left + SIDE]
        out.append(cut.flip(2) if u[i, 2] < 0.5 else cut)
    return torch.stack(out)


@pytest.mark.parametrize(
    "cls, settings, sign, moved",
    [
        (TAP, {"target_shift": 2}, -1, 2),
        (TAP, {"targeted": False}, 1, 0),
        (Hypo, {"step_size": 0.4 / 255}, -1, 0),
    ],
)
def test_crafting_is_the_naive_loop_in_float64_through_shifts_of_each_step(cls, settings, sign, moved):
    poison = make(cls, steps=7, restarts=1, padding=2, **settings)
    surrogate, batch = linear(), images()
    x, y = batch.x.double(), batch.y
    rng = KeyedRandom(0, sample_ids(batch.keys), 0, "here")
    start = Linf(8 / 255).start_(x.clone(), x, rng, "pgd/start/0") - x
    view = lambda seen, step: shift_by_hand(seen, rng.within(f"step{step}"), 2)
    target = (y + moved) % CLASSES
    wanted = step_by_hand(surrogate, x, target, start, sign=sign, steps=7, size=0.4 / 255, eps=8 / 255, view=view)
    torch.testing.assert_close(poison.craft(surrogate, x, y, rng) - x, wanted, rtol=0, atol=1e-12)


def test_of_several_starts_the_best_is_kept():
    surrogate, batch = linear(scale=1.0), images()
    x, y, rng = batch.x.double(), batch.y, KeyedRandom(0, torch.arange(30))
    losses = []
    for restarts in (1, 4):
        poison = make(TAP, steps=3, restarts=restarts, padding=0)
        losses.append(surrogate.loss_of_each(poison.craft(surrogate, x, y, rng), (y + 1) % CLASSES))
    assert (losses[1] <= losses[0]).all() and (losses[1] < losses[0]).any()


def test_shifts_have_the_gradient_of_a_copy():
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    rng = KeyedRandom(0, torch.arange(2))
    assert torch.autograd.gradcheck(lambda v: shift(v, rng, 2), (x,))
    assert shift(x, rng, 0) is x


def test_the_surrogate_takes_most_pictures_of_tap_for_their_target():
    wide = {**SMALL, "model": {**MODEL, "stem_stride": 1, "widths": (8, 8, 16, 16)}}
    poison = make(TAP, epochs=30, steps=60, restarts=1, padding=0, eps=40 / 255, surrogate=wide)
    seen = {}
    kept = poison._craft
    poison._craft = lambda surrogate, *rest: (seen.update(net=surrogate), kept(surrogate, *rest))
    batch = images()
    poison.fit([batch])
    scores = seen["net"].eval()(poison.apply(batch).x)
    hits = (scores.argmax(1) == (batch.y + 1) % CLASSES).float().mean()
    assert hits >= 0.95, hits


def test_hypo_trains_its_surrogate_on_attacked_pictures():
    batch, poison = images(), make(Hypo, padding=0)
    surrogate = Surrogate(SurrogateConfig(**SMALL), num_classes=CLASSES, seed=0, device=CPU)
    seen = []
    surrogate.learn = lambda x, y, rate: seen.append(x)
    poison.train_step(surrogate, batch.x, batch.y, KeyedRandom(0, torch.arange(30)), 1.0)
    assert 1.9 / 255 < (seen[0] - batch.x).abs().max() <= 2.0001 / 255
    with torch.no_grad():
        surrogate.eval()
        assert surrogate.loss_of_each(seen[0], batch.y).mean() > surrogate.loss_of_each(batch.x, batch.y).mean()


# Going on


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "cls, settings, after",
    [
        (EM, {"steps": 2, "train_steps": 2, "max_rounds": 4, "stop": 0.0}, 2),
        (EM, {"per": "class", "share": 0.5, "train_steps": 2, "max_rounds": 4, "stop": 0.0}, 2),
        (REMLite, {"train_steps": 2, "max_rounds": 4, "stop": 0.0}, 2),
        (TAP, {"epochs": 2, "steps": 2, "batch_size": 8}, 2),
        (TAP, {"epochs": 2, "steps": 2, "batch_size": 8}, 6),
        (Hypo, {"epochs": 2, "steps": 2, "batch_size": 8}, 5),
    ],
)
def test_a_stopped_training_goes_on_to_the_bit(cls, settings, after, tmp_path, monkeypatch):
    batch, whole = images(), make(cls, **settings)
    whole.fit([batch])
    monkeypatch.setattr(progress_file.Progress, "due", lambda self: self.file is not None)
    kept, saves = progress_file.Progress.save, []

    def save(self, *state):
        kept(self, *state)
        saves.append(state[0])
        if len(saves) == after:
            raise Stopped

    monkeypatch.setattr(progress_file.Progress, "save", save)
    stopped = make(cls, **settings)
    stopped.work_in(tmp_path, CPU)
    with pytest.raises(Stopped):
        stopped.fit([batch])
    again = make(cls, **settings)
    again.work_in(tmp_path, CPU)
    again.fit([batch])
    assert torch.equal(again.table, whole.table)
    assert saves[after] != saves[after - 1]  # it did not begin anew
    again.finish()
    assert not list(tmp_path.iterdir())


def test_what_another_setting_or_other_data_left_is_not_gone_on_from(tmp_path, caplog):
    settings = {"steps": 1, "train_steps": 1, "max_rounds": 1}
    first = make(EM, **settings)
    first.work_in(tmp_path, CPU)
    first.fit([images()])
    for poison, batch in ((make(EM, seed=1, **settings), images()), (make(EM, **settings), images(seed=1))):
        fresh = copy.deepcopy(poison)
        poison.work_in(tmp_path, CPU)
        with caplog.at_level("INFO"):
            poison.fit([batch])
        fresh.fit([batch])
        assert torch.equal(poison.table, fresh.table)
    assert "is begun anew" in caplog.text
    (tmp_path / "em.learning.safetensors").write_bytes(b"nothing of the kind")
    poison.fit([batch])
    assert torch.equal(poison.table, fresh.table) and "cannot be read" in caplog.text


def test_a_large_table_lies_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("poisonshield.poisons.learned.pictures.LARGE", 100)
    file = tmp_path / "table.bin"
    table = make_table((5, 3, 4, 4), torch.int8, file)
    table[2] = 7
    assert file.stat().st_size == 240 and file.read_bytes()[96:144] == b"\x07" * 48
    assert make_table((5, 3, 1, 1), torch.int8, file).sum() == 0


# Words


def test_faults_are_told_in_words():
    with pytest.raises(PoisonShieldError, match="call fit"):
        make(EM).apply(images())
    with pytest.raises(DataError, match="was shown none"):
        make(EM).fit([])
    with pytest.raises(DataError, match="two pictures have one key"):
        make(EM).fit([images(3), images(3)])
    with pytest.raises(ConfigError, match="its own target"):
        make(TAP, target_shift=3)
    with pytest.raises(ValueError, match="belongs to targeted"):
        make(TAP, target_shift=2, targeted=False)


def test_levels_of_a_strangers_recipe_stay_within_eps():
    poison = make(EM, steps=1, train_steps=1, max_rounds=1)
    poison.fit([images()])
    poison.table.fill_(100)
    grey = images().replace(x=torch.full((30, 3, SIDE, SIDE), 0.5))
    assert poison.delta(grey).abs().max() <= 8 / 255 + 1e-7


# The command


@pytest.mark.parametrize("name", ["em", "tap"])
def test_the_command_writes_shards_and_a_recipe_and_leaves_nothing_else(name, tmp_path):
    small = "{model: {name: resnet_mini, stem_stride: 2, widths: [4, 4, 8, 8]}, batch_size: 512}"
    few = "steps: 1, max_rounds: 1, train_steps: 1" if name == "em" else "epochs: 0, steps: 1, restarts: 1"
    changes = [f"data.poison={{name: {name}, {few}, surrogate: {small}}}", f"run.dir={tmp_path}/run"]
    with pytest.raises(SystemExit, match="^0$"):
        main(["poison", f"poison/{name}_cifar10_mini", *changes, "engine.device=cpu"])
    manifest = json.loads((tmp_path / "run/train/manifest.json").read_text())
    assert manifest["poison"]["name"] == name and manifest["poison"]["measured"]["linf_levels"] <= 8
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert f"{name}.poison.safetensors" in names and not any("learning" in n or n.endswith(".bin") for n in names)

"""An ascent that is recorded and replayed: the same pixels, from buffers of its own, whatever has changed since.

There is no GPU here, so what records is a stand-in that keeps the Python function and calls it again; the pixels are on
the pretend device. A stand-in that reads a buffer at the wrong time gives wrong pixels as a graph would.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from pretend_device import CUDA, pretend_device
from tiny import tiny_batch, tiny_encoder

from poisonshield.attacks import PGD, Linf, Repeated, frozen_stats
from poisonshield.attacks.parts import graphs
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.methods.simclr import SimCLR
from poisonshield.random import KeyedRandom, sample_ids

BALL = Linf(8 / 255)


class Recorder:
    """Stands in for CUDA's graphs: counts recordings and replays."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.fails = None

    def __call__(self, work):
        self.recorded += 1
        if self.fails:
            raise RuntimeError(self.fails)

        def replay():
            self.replayed += 1
            work()

        return replay


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = tiny_encoder(), None
        self.head = torch.nn.Linear(self.encoder.feature_dim, 4)

    def loss(self, x, y):
        return F.cross_entropy(self.head(self.encoder(x)), y, reduction="none")

    def objective(self, y):
        return Repeated(self.loss, (y,), (*self.parameters(), *self.buffers()))


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    with pretend_device():
        monkeypatch.setattr(graphs, "record", found)
        yield found
        monkeypatch.undo()


def attack_both(model, rounds, change=lambda i: None, sizes=None, **settings):
    """The pixels of each round with graphs and without, of new pixels, labels and random starts."""
    ours, plain = (PGD(steps=3, step_size=2 / 255, graph=wish, **settings) for wish in ("auto", "off"))
    pairs = []
    for i in range(rounds):
        size = 6 if sizes is None else sizes[i]
        draw = torch.Generator().manual_seed(i)
        x, y = torch.rand(size, 3, 8, 8, generator=draw).to(CUDA), torch.randint(0, 4, (size,), generator=draw).to(CUDA)
        rng = KeyedRandom(i, sample_ids([f"k{i}-{n}" for n in range(size)]).to(CUDA), offset=i)
        before = x.clone()
        with frozen_stats(model):
            pairs.append(tuple(a(model.objective(y), x, BALL, rng).cpu() for a in (ours, plain)))
        assert torch.equal(x.cpu(), before.cpu())
        change(i)
    return pairs


def all_equal(pairs):
    return all(torch.equal(a, b) for a, b in pairs)


def test_replays_give_the_pixels_of_single_steps(recorder):
    pairs = attack_both(Model().to(CUDA), 5)
    assert all_equal(pairs) and (recorder.recorded, recorder.replayed) == (1, 4)
    assert not torch.equal(pairs[3][0], pairs[4][0])


def test_results_are_not_overwritten_by_the_next_replay(recorder):
    model, attack = Model().to(CUDA), PGD(steps=2, step_size=2 / 255)
    outs, copies = [], []
    with frozen_stats(model):
        for i in range(4):
            x, y = torch.full((6, 3, 8, 8), 0.2 * i).to(CUDA), torch.zeros(6, dtype=torch.long).to(CUDA)
            outs.append(attack(model.objective(y), x, BALL, KeyedRandom(i, torch.arange(6).to(CUDA))))
            copies.append(outs[-1].cpu())
    assert all(torch.equal(out.cpu(), kept) for out, kept in zip(outs, copies, strict=True))


def test_weights_and_statistics_may_change_in_place(recorder):
    model = Model().to(CUDA)

    def train(i):
        with torch.no_grad():
            for v in (*model.parameters(), *model.buffers()):
                if v.is_floating_point():
                    v.mul_(1.1)

    pairs = attack_both(model, 4, train)
    assert all_equal(pairs) and recorder.recorded == 1


def test_weights_that_lie_elsewhere_get_a_graph_of_their_own(recorder):
    model = Model().to(CUDA)

    def move(i):
        if i == 2:
            model.head = copy.deepcopy(model.head)
            with torch.no_grad():
                model.head.weight.neg_()

    assert all_equal(attack_both(model, 6, move)) and recorder.recorded == 2


def test_last_smaller_batch_gets_a_graph_of_its_own_when_it_comes_again(recorder):
    sizes = [6, 6, 6, 2, 6, 6, 2, 6, 2]
    assert all_equal(attack_both(Model().to(CUDA), len(sizes), sizes=sizes)) and recorder.recorded == 2


def test_batches_of_many_sizes_do_not_fill_the_memory(recorder, caplog):
    sizes = [n for n in range(1, 8) for _ in range(3)]
    with caplog.at_level(logging.WARNING, "poisonshield"):
        assert all_equal(attack_both(Model().to(CUDA), len(sizes), sizes=sizes))
    assert recorder.recorded == graphs.MOST and len(caplog.messages) == 1 and "another kind" in caplog.messages[0]


def test_recording_that_fails_is_told_once_and_does_no_harm(recorder, caplog):
    recorder.fails = "operation not permitted when stream is capturing\nmore"
    with caplog.at_level(logging.WARNING, "poisonshield"):
        assert all_equal(attack_both(Model().to(CUDA), 4))
    assert recorder.recorded == 1 and recorder.replayed == 0
    assert caplog.messages == [
        "The attack runs step by step and not as a CUDA graph: recording failed: operation not permitted when stream "
        "is capturing."
    ]


@pytest.mark.parametrize(
    ("settings", "objective", "reason"),
    [
        ({"restarts": 2}, None, "it restarts, and compares losses in between"),
        ({}, lambda x: x.sum((1, 2, 3)), "its objective does not say which tensors it depends on"),
    ],
)
def test_calls_that_cannot_be_recorded_run_step_by_step_and_say_so_where_asked(
    recorder, caplog, settings, objective, reason
):
    model, x = Model().to(CUDA), torch.full((4, 3, 8, 8), 0.5).to(CUDA)
    attack = PGD(steps=1, graph="on", **settings)
    with caplog.at_level(logging.WARNING, "poisonshield"), frozen_stats(model):
        for _ in range(3):
            y = torch.zeros(4, dtype=torch.long).to(CUDA)
            attack(objective or model.objective(y), x, BALL, KeyedRandom(0, torch.arange(4).to(CUDA)))
    assert recorder.recorded == 0 and len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_samples_that_stop_by_themselves_are_not_recorded(recorder, caplog):
    model, x, y = Model().to(CUDA), torch.full((4, 3, 8, 8), 0.5).to(CUDA), torch.zeros(4, dtype=torch.long).to(CUDA)
    with caplog.at_level(logging.WARNING, "poisonshield"), frozen_stats(model):
        for wish in ("auto", "on"):
            attack = PGD(steps=2, graph=wish, stop_loss=50.0)
            for _ in range(3):
                attack(model.objective(y), x, BALL, KeyedRandom(0, torch.arange(4).to(CUDA)))
    assert recorder.recorded == 0 and len(caplog.messages) == 1 and "with stop_loss" in caplog.messages[0]


def test_cpu_runs_step_by_step_without_a_word_unless_asked(caplog):
    x, y = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    with caplog.at_level(logging.WARNING, "poisonshield"):
        for wish in ("auto", "on"):
            PGD(steps=1, graph=wish)(Model().objective(y), x, BALL, KeyedRandom(0, torch.arange(4)))
    assert len(caplog.messages) == 1 and "the pixels are on cpu" in caplog.messages[0]


def test_copies_of_an_attack_share_no_graph(recorder):
    attack = PGD(steps=1)
    attack.graphs._recorded["some kind"] = object()
    assert copy.deepcopy(attack).graphs._recorded == {} and copy.deepcopy(attack).config == attack.config


def test_joint_steps_attack_alike_with_graphs(recorder):
    def build(wish):
        torch.manual_seed(0)
        method = SimCLR(SimCLR.Config(hidden=12, out=10), encoder=tiny_encoder(), num_classes=4)
        config = VESPR.Config(attack={"steps": 3, "graph": wish}, attack_views="both")
        return VESPR(config, Context(5, 4)).wrap(method).train().to(CUDA)

    ours, plain = build("auto"), build("off")
    for i in range(3):
        batch = tiny_batch(8, seed=i).to(CUDA)
        for model in (ours, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
            model(batch).loss.backward()
            optimizer.step()
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs) and recorder.recorded == 1 and recorder.replayed == 5


@pytest.mark.parametrize(
    ("written", "read"), [("auto", None), (None, None), ("on", "on"), (True, "on"), (False, "off")]
)
def test_setting_is_read_as_yaml_gives_it(written, read):
    assert PGD(graph=written).config.graph == read
    assert PGD().config.graph is None  # null is as good as absent: a run of an earlier version goes on

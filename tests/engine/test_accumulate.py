"""Two batches of four in a step are one batch of eight: against a loop over eights, on every backend, stopped, bad."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.tiny import TinyStream, by_hand, difference, losses, same_bits, weights
from poisonshield import collectives
from poisonshield.batch import StepOutput
from poisonshield.engine.guards import NonFiniteError
from poisonshield.engine.optim import OptimConfig
from poisonshield.engine.processes import processes
from poisonshield.engine.runfolder import RunFolder
from poisonshield.engine.schedule import ScheduleConfig, lr_at
from poisonshield.engine.settings import EngineConfig
from poisonshield.engine.trainer import Trainer
from poisonshield.method import SSLMethod

STEPS, CLIP = 8, 0.1  # the gradient's norm is above 0.1, so clipping bites
CLOSE = 1e-6  # float32 sums of eight terms in another order
BACKENDS = {"plain": {}, **{f"zero{s}": {"backend": "deepspeed", "zero_stage": s} for s in range(4)}}


class Halves:
    """TinyStream's batches of eight as two of four each; `bad`: which of the fours are not finite."""

    steps_per_epoch = 2 * TinyStream.steps_per_epoch
    stage_seconds = 0.0

    def __init__(self, bad=(), stop_at=None):
        self.position, self.bad, self.stop_at = 0, bad, stop_at

    def __iter__(self):
        while True:
            if self.position == self.stop_at:
                raise KeyboardInterrupt
            whole = TinyStream()
            whole.step, half = divmod(self.position, 2)
            batch = next(iter(whole))
            mine = slice(half * len(batch) // 2, (half + 1) * len(batch) // 2)
            x = batch.x[mine] * (float("nan") if self.position in self.bad else 1.0)
            self.position += 1
            yield batch.replace(keys=batch.keys[mine], x=x, views=(x,), y=batch.y[mine], rank_sizes=None)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class MeanMethod(SSLMethod):
    """A loss that is a mean over samples, with noise by key; buffers that a forward and that a step move."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 3)
        self.register_buffer("forwards", torch.zeros(1))
        self.register_buffer("average", torch.zeros(3, 8))

    def forward(self, batch):
        self.forwards += 1
        noise = batch.random(7).normal("noise", batch.x[0].numel()).view(batch.x.shape)
        per_sample = F.cross_entropy(self.head(self.encoder(batch.x + 0.1 * noise)), batch.y, reduction="none")
        return StepOutput(collectives.mean(per_sample, batch.rank_sizes))

    def loss(self, features, batch):
        raise NotImplementedError

    def after_step(self, progress):
        self.average.lerp_(self.head.weight.detach(), 0.1)


def train(folder, stream=None, *, schedule=None, optimizer="sgd", clip_norm=CLIP, **engine):
    """The trainer of a run on fours, two a step."""
    wanted = {"max_steps": STEPS, "accumulate": 2, "log_every_steps": 1, "device": "cpu", **engine}
    config = EngineConfig(**wanted)
    optim = OptimConfig(name=optimizer, lr=0.1 if optimizer == "sgd" else 0.01, weight_decay=1e-4, clip_norm=clip_norm)
    schedule = schedule or ScheduleConfig(warmup_steps=3)
    with processes(config, seed=1):
        trainer = Trainer(
            MeanMethod(), Halves() if stream is None else stream, config, optimizer=optim, schedule=schedule,
            run_folder=RunFolder(folder), seed=1, fixed_record={"engine": config.model_dump()},
        )  # fmt: skip
        trainer.fit()
    return trainer


def rates(total=STEPS, lr=0.1):
    """The rate of each step of a run."""
    run = {"total_steps": total, "steps_per_epoch": TinyStream.steps_per_epoch}
    return [lr_at(ScheduleConfig(warmup_steps=3), lr=lr, step=s, **run) for s in range(total)]


def in_eights(*, optimizer="sgd", clip_norm=CLIP, **loop):
    """The method after a loop, written out, over batches of eight."""
    lr = 0.1 if optimizer == "sgd" else 0.01
    return by_hand(rates(lr=lr), method_class=MeanMethod, optimizer=optimizer, clip_norm=clip_norm, **loop)


def moved(state):
    """All but the count of forwards, of which fours need twice as many."""
    return {k: v for k, v in state.items() if k != "forwards"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_fours_a_step_are_one_eight(tmp_path, optimizer):
    trainer = train(tmp_path, optimizer=optimizer)
    hand = weights(in_eights(optimizer=optimizer))
    assert difference(moved(weights(trainer.method)), moved(hand)) < CLOSE
    assert trainer.method.forwards == 2 * STEPS and hand["forwards"] == STEPS
    assert trainer.stream.position == 2 * STEPS and trainer.step == STEPS


def test_equality_with_eights_would_notice_a_sum_or_a_lost_half(tmp_path):
    """Fours one a step, at the same rates, go elsewhere; and so does clipping of another length."""
    hand = moved(weights(in_eights()))
    assert difference(moved(weights(train(tmp_path / "a", accumulate=1).method)), hand) > 1e-3
    assert difference(moved(weights(in_eights(clip_norm=2 * CLIP))), hand) > 1e-3


def test_logged_losses_are_means_over_the_step(tmp_path):
    train(tmp_path, clip_norm=None)
    torch.manual_seed(1)
    method = MeanMethod()
    first = next(iter(TinyStream()))
    assert losses(tmp_path)[0] == pytest.approx(method(first).loss.item(), abs=CLOSE)
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.parametrize(("stop", "died_at"), [(1, 3), (3, 6), (3, 7), (5, 11), (7, 15)])
def test_run_that_died_within_a_step_and_was_resumed_equals_an_uninterrupted_one(tmp_path, stop, died_at):
    """died_at: which four was asked for last; the first half of a step leaves no trace."""
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Halves(stop_at=died_at), checkpoint_every_steps=stop)
    resumed = train(tmp_path / "run", checkpoint_every_steps=stop, resume="auto")
    assert same_bits(weights(resumed.method), weights(whole.method))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and resumed.stream.position == 2 * STEPS


@pytest.mark.parametrize(("epochs", "accumulate", "steps"), [(2, 2, 12), (1, 5, 2), (3, 8, 4), (1, 100, 1), (1, 1, 12)])
def test_an_epoch_is_one_pass_over_the_data_however_many_batches_a_step_takes(tmp_path, epochs, accumulate, steps):
    trainer = train(tmp_path, max_steps=None, epochs=epochs, accumulate=accumulate)
    assert (trainer.step, trainer.stream.position) == (steps, steps * accumulate)


@pytest.mark.parametrize(
    "schedule",
    [
        {"warmup_epochs": 1},
        {"name": "cosine", "per_epoch": True, "warmup_epochs": 1},
        {"name": "step", "per_epoch": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_schedules_that_count_epochs_count_passes_over_the_data(tmp_path, schedule, accumulate):
    schedule = ScheduleConfig(**schedule)
    train(tmp_path, schedule=schedule, max_steps=None, epochs=3, accumulate=accumulate)
    seen = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    per_epoch = 12 // accumulate
    run = {"total_steps": 3 * per_epoch, "steps_per_epoch": per_epoch}
    assert seen == pytest.approx([lr_at(schedule, lr=0.1, step=s, **run) for s in range(3 * per_epoch)])
    assert len(set(seen)) > 1


def test_steps_that_do_not_divide_an_epoch_still_follow_it(tmp_path):
    """Five fours a step, twelve an epoch: steps 0 to 2 begin in epoch one, 3 and 4 in epoch two, 5 to 7 in three."""
    schedule = ScheduleConfig(name="constant", per_epoch=True, warmup_epochs=3)
    train(tmp_path, schedule=schedule, max_steps=8, accumulate=5)
    seen = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == pytest.approx([0.1 * (5 * step // 12 + 1) / 3 for step in range(8)])


@pytest.mark.parametrize("half", [0, 1])
def test_a_bad_half_drops_the_whole_step(tmp_path, half, caplog):
    trainer = train(tmp_path, Halves(bad=(2 * 3 + half,)), nonfinite="skip")
    hand = weights(in_eights(bad_steps=(3,)))
    assert difference(moved(weights(trainer.method)), moved(hand)) < CLOSE
    assert trainer.method.forwards == 2 * (STEPS - 1)  # what both forwards did to buffers is dropped too
    assert "step 4: loss nan" in caplog.text and "The step was dropped (1 of at most 10)" in caplog.text
    assert len(losses(tmp_path)) == STEPS - 1 and all(math.isfinite(v) for v in losses(tmp_path))


@pytest.mark.parametrize("half", [0, 1])
def test_a_bad_half_stops_the_run_before_anything_moves_and_names_the_step(tmp_path, half):
    with pytest.raises(NonFiniteError, match="step 4: loss nan.*samples image-"):
        train(tmp_path, Halves(bad=(2 * 3 + half,)), checkpoint_every_steps=3)
    resumed = train(tmp_path, resume="auto", checkpoint_every_steps=3)
    assert difference(moved(weights(resumed.method)), moved(weights(in_eights()))) < CLOSE


def state_of(trainer):
    return {k: v.tolist() for k, v in trainer.state_dict().items() if k != "forwards"}


def two_ranks(rank, world, root):
    """{backend: (losses, state, state of a resumed run)} of fours that two ranks share."""
    out = {}
    for name, backend in BACKENDS.items():
        saving = {"checkpoint_every_steps": 3, "keep_checkpoints": 5, **backend}
        whole = state_of(train(root / name, **saving))
        third = str(root / name / "checkpoints" / "step-00000003")
        out[name] = losses(root / name), whole, state_of(train(root / f"{name}-resumed", resume=third, **backend))
    skipping = train(root / "skip", Halves(bad=(6,) if rank == 1 else ()), nonfinite="skip")
    out["skip"] = state_of(skipping), float(skipping.method.forwards)
    return out


@pytest.fixture(scope="module")
def shared(ask_two_ranks):
    return ask_two_ranks(__name__).ranks


def tensors(state):
    return {k: torch.tensor(v) for k, v in state.items()}


@pytest.mark.dist
@pytest.mark.parametrize("name", BACKENDS)
def test_two_ranks_share_each_of_a_steps_batches(shared, tmp_path, name):
    """Two ranks, two batches each, are one process over eights; and resumed in the middle, to the bit."""
    seen, state, resumed = shared[0][name]
    assert difference(tensors(state), moved(weights(in_eights()))) < CLOSE
    train(tmp_path)
    assert seen == pytest.approx(losses(tmp_path), abs=CLOSE)
    assert resumed == state


@pytest.mark.dist
def test_a_bad_half_of_one_rank_drops_the_step_on_both(shared):
    for answers in shared:
        assert answers["skip"][1] == 2 * (STEPS - 1)
    assert difference(tensors(shared[0]["skip"][0]), moved(weights(in_eights(bad_steps=(3,))))) < CLOSE

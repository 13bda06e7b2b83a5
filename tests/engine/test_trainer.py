"""The loop against one written out by hand, and every way to stop and go on against never having stopped."""

import json
import logging
import os
import shutil

import pytest
import torch

from engine.tiny import (
    Interrupted,
    TinyMethod,
    TinyStream,
    by_hand,
    difference,
    losses,
    make_trainer,
    same_bits,
    train,
    weights,
)
from poisonshield.engine.checkpoint import load_plain, verify
from poisonshield.engine.processes import processes
from poisonshield.engine.schedule import ScheduleConfig, lr_at
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import CheckpointError, ConfigError

SETTINGS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw"},
    "bf16": {"precision": "bf16"},
    "channels last, no clipping": {"channels_last": True, "clip_norm": None},
}


def rates(steps, total, lr=0.1):
    """What the tiny run's schedule gives for some steps of a run of `total`."""
    schedule = ScheduleConfig(warmup_steps=3)
    return [lr_at(schedule, lr=lr, step=s, total_steps=total, steps_per_epoch=6) for s in steps]


def crash():
    raise KeyboardInterrupt


def run_and_crash(folder, at, **settings):
    """A run that dies without a word when it asks for batch `at`."""
    with pytest.raises(KeyboardInterrupt):
        train(folder, stream=Interrupted(at, crash), **settings)


def lines(folder):
    """metrics.jsonl without what depends on the time of day."""
    clock = {"img/s", "data", "augment", "mem", "left", "seconds"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def leaves(value, where=""):
    """Every tensor and plain value of a checkpoint file by its place, without the clock."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("seconds", "latest"):
                yield from leaves(item, f"{where}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{where}/{i}")
    else:
        yield where, value.tolist() if isinstance(value, torch.Tensor) else value


def everything(folder, step=15):
    """All that the checkpoint of a step holds."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    files = sorted(p.name for p in path.glob("*.pt"))
    assert files == ["method.pt", "optimizer.pt", "rank-0.pt"]
    return {name: dict(leaves(load_plain(path / name))) for name in files}


@pytest.fixture(scope="module", params=SETTINGS)
def uninterrupted(request, tmp_path_factory):
    """Settings, and the folder of a run with them that was never stopped; lines every 4 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = {**SETTINGS[request.param], "log_every_steps": 4}
    train(folder, **settings)
    return settings, folder


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_run_is_the_loop_written_out(tmp_path, optimizer):
    trainer, done = train(tmp_path, optimizer=optimizer, clip_norm=0.3)
    lr = 0.1 if optimizer == "sgd" else 0.01
    hand = weights(by_hand(rates(range(15), 15, lr), optimizer=optimizer, clip_norm=0.3))
    ours = weights(trainer.method)
    if optimizer == "adamw":  # a bias before batch norm has no gradient but rounding, which Adam blows up
        for state in (ours, hand):
            del state["encoder.0.bias"], state["encoder.1.running_mean"]
    assert difference(ours, hand) < 1e-5 and done["steps"] == 15
    assert [row["lr"] for row in lines(tmp_path)] == rates(range(15), 15, lr)


def test_gradient_of_the_loop_written_out_is_long_enough_to_be_clipped():
    short, long = (weights(by_hand(rates(range(15), 15), clip_norm=norm)) for norm in (0.3, 100.0))
    assert difference(short, long) > 1e-3


@pytest.mark.parametrize("stop", [1, 4, 6, 11, 14])
def test_run_stopped_anywhere_and_resumed_equals_an_uninterrupted_one(tmp_path, uninterrupted, stop):
    """Weights, momenta, random states, stream, counters and logged lines, bit for bit, though it died a step later."""
    settings, whole = uninterrupted
    run_and_crash(tmp_path, stop + (stop < 14), checkpoint_every_steps=stop, **settings)
    trainer, _ = train(tmp_path, resume="auto", **settings)
    assert everything(tmp_path) == everything(whole) and lines(tmp_path) == lines(whole)
    assert trainer.step == 15


def test_run_stopped_many_times_equals_an_uninterrupted_one(tmp_path, uninterrupted):
    settings, whole = uninterrupted
    for at in (3, 7, 8, 13):
        run_and_crash(tmp_path, at, checkpoint_every_steps=2, resume="auto", **settings)
    train(tmp_path, checkpoint_every_steps=2, resume="auto", **settings)
    assert everything(tmp_path) == everything(whole) and lines(tmp_path) == lines(whole)


def test_run_that_died_before_its_first_checkpoint_starts_over_with_no_trace(tmp_path, uninterrupted):
    settings, whole = uninterrupted
    run_and_crash(tmp_path, 9, resume="auto", **settings)
    assert lines(tmp_path)
    train(tmp_path, resume="auto", **settings)
    assert everything(tmp_path) == everything(whole) and lines(tmp_path) == lines(whole)


def test_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, uninterrupted, caplog):
    settings, whole = uninterrupted
    run_and_crash(tmp_path, 11, checkpoint_every_steps=5, **settings)
    os.truncate(tmp_path / "checkpoints" / "step-00000010" / "optimizer.pt", 50)
    with caplog.at_level(logging.INFO, "poisonshield"):
        train(tmp_path, resume="auto", **settings)
    assert "optimizer.pt has 50 bytes" in caplog.text and "steps 6 to 15" in caplog.text
    assert everything(tmp_path) == everything(whole) and lines(tmp_path) == lines(whole)
    there = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert there == ["aside-step-00000010", "step-00000005", "step-00000015"]


def test_resume_with_more_steps_follows_the_longer_schedule_from_there(tmp_path):
    train(tmp_path, max_steps=6)
    trainer, _ = train(tmp_path, max_steps=12, resume="auto")
    expected = by_hand(rates(range(6), 6) + rates(range(6, 12), 12))
    assert difference(weights(trainer.method), weights(expected)) < 1e-5
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 13))


def test_resume_with_fewer_steps_ends_where_it_is_told(tmp_path):
    train(tmp_path, max_steps=15, checkpoint_every_steps=5, keep_checkpoints=3)
    path = tmp_path / "checkpoints" / "step-00000005"
    trainer, _ = train(tmp_path, max_steps=8, resume=str(path))
    expected = by_hand(rates(range(5), 15) + rates(range(5, 8), 8))
    assert difference(weights(trainer.method), weights(expected)) < 1e-5 and trainer.step == 8


def test_finished_run_resumed_does_nothing_and_gives_its_numbers_again(tmp_path):
    trainer, done = train(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    again, repeated = train(tmp_path, stream=Interrupted(15, crash), resume="auto")
    assert same_bits(weights(again.method), weights(trainer.method)) and repeated["steps"] == 15
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {k: v for k, v in done.items() if k != "seconds"}
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == before
    assert len(lines(tmp_path)) == 15


@pytest.mark.parametrize("form", ["checkpoint", "run folder", "relative", "link"])
def test_explicit_path_goes_on_from_there_and_leaves_the_future_behind(tmp_path, monkeypatch, form):
    """Whatever way the path is written: a crash later must not fall into a future that the run has left."""
    run = tmp_path / "run"
    train(run, checkpoint_every_steps=5, keep_checkpoints=3)
    whole, told = everything(run), lines(run)
    if form == "run folder":
        shutil.rmtree(run / "checkpoints" / "step-00000015")
        shutil.rmtree(run / "checkpoints" / "step-00000010")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    base = {"relative": "run", "link": str(tmp_path / "link")}.get(form, str(run))
    path = base if form == "run folder" else f"{base}/checkpoints/step-00000005"
    run_and_crash(run, 7, resume=path)
    assert [row["step"] for row in lines(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000005"]
    train(run, resume="auto", checkpoint_every_steps=5)
    assert everything(run) == whole and lines(run) == told


def test_explicit_path_of_another_run_starts_from_its_state_and_leaves_it_alone(tmp_path):
    train(tmp_path / "a", checkpoint_every_steps=5, keep_checkpoints=3)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    train(tmp_path / "b", max_steps=12, checkpoint_every_steps=4)  # a history of its own, which does not mix in
    trainer, _ = train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoints" / "step-00000010"))
    assert everything(tmp_path / "b") == everything(tmp_path / "a")
    assert [p.name for p in sorted((tmp_path / "b" / "checkpoints").glob("step-*"))] == ["step-00000015"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before and trainer.step == 15


def test_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere holds no checkpoint"):
        train(tmp_path / "run", resume=str(tmp_path / "nowhere"))


def test_where_all_checkpoints_are_damaged_the_run_ends_and_the_advice_helps(tmp_path):
    train(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "step-00000015" / "method.pt", 10)
    with pytest.raises(CheckpointError, match="start over with engine.resume=false run.overwrite=true"):
        train(tmp_path, resume="auto")
    assert train(tmp_path, resume=False, overwrite=True)[1]["steps"] == 15


def test_checkpoint_whose_index_names_another_backend_than_wrote_it_is_refused_by_its_file(tmp_path):
    train(tmp_path, max_steps=2)
    index = tmp_path / "checkpoints" / "step-00000002" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "backend": "deepspeed", "zero_stage": 2}))
    index.with_suffix(".sha256").unlink()
    with pytest.raises(CheckpointError, match=r"deepspeed/state/mp_rank_00_model_states.pt cannot be read"):
        train(tmp_path, max_steps=4, resume="auto")


def test_method_that_lost_a_layer_does_not_load_quietly(tmp_path):
    class Other(TinyMethod):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    train(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match="extra.weight"):
        train(tmp_path, method_class=Other, max_steps=4, resume="auto")


def test_run_of_other_settings_is_refused_before_it_touches_anything(tmp_path):
    train(tmp_path, max_steps=3)
    with pytest.raises(ConfigError, match="optimizer.name"):
        train(tmp_path, optimizer="adamw", max_steps=3)
    assert len(lines(tmp_path)) == 3 and verify(tmp_path / "checkpoints" / "step-00000003")


def test_starting_over_gives_the_same(tmp_path):
    train(tmp_path)
    first = everything(tmp_path), lines(tmp_path)
    train(tmp_path, overwrite=True)
    assert (everything(tmp_path), lines(tmp_path)) == first


@pytest.mark.parametrize(
    ("every", "keep", "steps"), [(None, 2, [15]), (5, 2, [10, 15]), (4, 3, [8, 12, 15]), (6, 9, [6, 12, 15])]
)
def test_checkpoints_fall_where_they_are_due_and_at_the_end(tmp_path, every, keep, steps):
    train(tmp_path, checkpoint_every_steps=every, keep_checkpoints=keep)
    found = sorted((tmp_path / "checkpoints").iterdir())
    assert [verify(p)["step"] for p in found] == steps


def test_checkpoint_tells_what_it_is(tmp_path):
    trainer, _ = train(tmp_path, max_steps=2)
    index = verify(tmp_path / "checkpoints" / "step-00000002")
    assert (index["world_size"], index["backend"], index["zero_stage"]) == (1, "plain", 0)
    assert index["versions"]["torch"] == torch.__version__ and index["config"]["seed"] == 1
    assert index["config"]["optimizer"]["lr"] == 0.1
    assert set(index["files"]) == {"method.pt", "optimizer.pt", "rank-0.pt"}
    assert same_bits(load_plain(tmp_path / "checkpoints" / "step-00000002" / "method.pt"), weights(trainer.method))


def test_length_may_be_told_in_epochs(tmp_path):
    trainer, done = train(tmp_path, max_steps=None, epochs=2)
    assert (trainer.total_steps, done["steps"], trainer.stream.step) == (12, 12, 12)


def test_state_is_whole_and_a_copy(tmp_path):
    trainer, _ = train(tmp_path, max_steps=2)
    state = trainer.state_dict()
    assert same_bits(state, weights(trainer.method))
    for value in state.values():
        value.zero_()
    assert trainer.method.head.weight.abs().sum() > 0


def test_run_announces_itself_in_a_few_lines(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "poisonshield"):
        train(tmp_path, max_steps=1)
    before = caplog.messages[: next(i for i, m in enumerate(caplog.messages) if m.startswith("step "))]
    trainable = sum(p.numel() for p in TinyMethod().parameters())
    told = "\n".join(before)
    assert len(before) < 20 and f"TinyMethod, {trainable:,} trainable parameters" in told
    for part in ("1 x cpu on ", "backend plain, fp32", "steps 1 to 1 (6 an epoch), from the start", str(tmp_path)):
        assert part in told


def test_bf16_stays_near_fp32_with_weights_and_statistics_in_fp32(tmp_path):
    _, _ = train(tmp_path / "fp32")
    trainer, _ = train(tmp_path / "bf16", precision="bf16")
    pairs = list(zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True))
    assert max(abs(a - b) for a, b in pairs) < 0.03 and any(a != b for a, b in pairs)
    assert {v.dtype for v in trainer.state_dict().values()} == {torch.float32, torch.int64}


def test_mode_is_training_even_if_the_method_was_left_evaluating(tmp_path):
    with processes(EngineConfig(max_steps=1, device="cpu"), seed=1):
        trainer = make_trainer(tmp_path, method=TinyMethod().eval(), max_steps=1)
        trainer.fit()
    assert trainer.method.encoder[1].num_batches_tracked == 1


def test_run_that_is_refused_when_it_loads_leaves_the_settings_of_the_one_before(tmp_path):
    """faults B: resume refused, config.yaml rewritten already, and the original settings refused from then on."""
    train(tmp_path, max_steps=4)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    class Elsewhere(TinyStream):
        def load_state_dict(self, state):
            raise CheckpointError("the saved position belongs to other settings")

    with pytest.raises(CheckpointError, match="other settings"):
        train(tmp_path, stream=Elsewhere(), max_steps=9, resume="auto")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

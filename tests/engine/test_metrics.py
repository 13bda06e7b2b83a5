"""One line an interval, the same names on the console and in metrics.jsonl, and a clock that runs on over resumes."""

import json
import logging
import time

import pytest
import torch

from engine.tiny import train
from poisonshield.batch import Batch, StepOutput
from poisonshield.engine import metrics
from poisonshield.engine.metrics import Metrics, console_line, drop_lines_after, duration
from poisonshield.engine.runfolder import RunFolder

STYLE = "step  1200/40000  loss 4.81  ssl 4.31  ce 0.50  lr 0.280  img/s 4310  data 1.8%  mem 31.2 GiB  left 2h41m"
STYLE_ROW = {
    "step": 1200, "loss": 4.806, "ssl": 4.309, "ce": 0.497, "lr": 0.28, "img/s": 4310.2, "data": 1.81, "augment": 2.0,
    "mem": 31.17, "left": 9683.0, "seconds": 300.0,
}  # fmt: skip


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock that poisonshield.engine.metrics reads."""
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def make(path, total=100, tensorboard=False):
    path.mkdir(exist_ok=True)
    return Metrics(RunFolder(path), torch.device("cpu"), total_steps=total, tensorboard=tensorboard)


def add(m, loss, ce, samples=4, rank_sizes=None):
    values = {"ce": torch.tensor(ce)}
    batch = Batch(tuple(f"k{i}" for i in range(samples)), rank_sizes=rank_sizes)
    m.add(StepOutput(torch.tensor(loss), values), batch)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_line_has_the_columns_of_the_house_style():
    assert console_line(STYLE_ROW, 40000) == STYLE


@pytest.mark.parametrize(
    ("lr", "text"), [(0.28, "0.280"), (0.01, "0.010"), (0.0, "0.000"), (0.0099, "9.9e-03"), (3e-5, "3.0e-05")]
)
def test_small_rates_keep_their_digits(lr, text):
    assert f"  lr {text}  " in console_line({**STYLE_ROW, "lr": lr}, 40000)


@pytest.mark.parametrize("step", [1, 12, 15])
def test_steps_are_as_wide_as_the_last(step):
    assert console_line({**STYLE_ROW, "step": step}, 15).split("  loss")[0] == f"step {step:2d}/15"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (9683, "2h41m"), (3.6e5, "100h00m")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_row_is_the_mean_of_its_interval_and_the_line_says_the_same(tmp_path, clock, caplog):
    m = make(tmp_path)
    m.start(0)
    for loss, ce in ((4.0, 1.0), (2.0, 0.5)):
        clock.now += 1.5
        with m.waiting():
            clock.now += 0.5
        m.add_stages(0.125)
        add(m, loss, ce)
    with caplog.at_level(logging.INFO, "poisonshield"):
        m.write(2, lr=0.25)
    (row,) = rows(tmp_path)
    memory = row.pop("mem")
    assert row == {
        "step": 2, "loss": 3.0, "ce": 0.75, "lr": 0.25, "img/s": 2.0, "data": 18.75, "augment": 6.25,
        "left": 196.0, "seconds": 4.0,
    }  # fmt: skip
    assert list(rows(tmp_path)[0]) == ["step", "loss", "ce", "lr", "img/s", "data", "augment", "mem", "left", "seconds"]
    assert 0.05 < memory < 50  # GiB of a process that has loaded torch
    expected = f"step   2/100  loss 3.00  ce 0.75  lr 0.250  img/s 2  data 18.8%  mem {memory:.1f} GiB  left 3m16s"
    assert caplog.messages == [expected]


def test_each_interval_starts_from_nothing(tmp_path, clock):
    m = make(tmp_path)
    m.start(0)
    for step, loss in ((1, 8.0), (3, 2.0)):
        with m.waiting():
            clock.now += 1.0
        clock.now += step
        add(m, loss, loss / 2, samples=6)
        m.write(step, lr=0.1)
    first, second = rows(tmp_path)
    assert (first["loss"], second["loss"], second["ce"]) == (8.0, 2.0, 1.0)
    assert (first["img/s"], second["img/s"]) == (3.0, 1.5) and (first["data"], second["data"]) == (50.0, 25.0)
    assert (first["left"], second["left"]) == (99 * 2.0, 97 * 4.0 / 2) and second["seconds"] == 6.0


def test_images_of_all_ranks_are_counted(tmp_path, clock):
    m = make(tmp_path)
    m.start(0)
    clock.now += 2.0
    add(m, 1.0, 1.0, samples=5, rank_sizes=(5, 3))
    m.write(1, lr=0.1)
    assert rows(tmp_path)[0]["img/s"] == 4.0


def test_interval_cut_by_a_resume_reports_what_an_uninterrupted_one_would(tmp_path, clock):
    """Three steps, a stop of an hour, two more: mean over five steps, clock and time left over the steps run."""
    before = make(tmp_path)
    before.start(0)
    for loss in (1.0, 2.0, 3.0):
        clock.now += 1.0
        add(before, loss, 0.0)
    state = before.state_dict()
    clock.now += 3600.0
    after = make(tmp_path)
    after.load_state_dict(state, same_ranks=True)
    after.start(3)
    for loss in (4.0, 10.0):
        clock.now += 1.0
        add(after, loss, 0.0)
    after.write(5, lr=0.1)
    (row,) = rows(tmp_path)
    assert (row["loss"], row["seconds"], row["left"], row["img/s"]) == (4.0, 5.0, 95.0, 4.0)


def test_on_another_number_of_ranks_the_unfinished_interval_is_let_go_but_not_the_clock(tmp_path, clock):
    before = make(tmp_path)
    before.start(0)
    clock.now += 7.0
    add(before, 100.0, 0.0)
    after = make(tmp_path)
    after.load_state_dict(before.state_dict(), same_ranks=False)
    after.start(1)
    clock.now += 1.0
    add(after, 2.0, 0.0)
    after.write(2, lr=0.1)
    assert (rows(tmp_path)[0]["loss"], rows(tmp_path)[0]["seconds"]) == (2.0, 8.0)


def test_lines_of_a_run_that_died_are_dropped_and_half_lines_too(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0 / s}) for s in (5, 10, 15)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    with caplog.at_level(logging.WARNING, "poisonshield"):
        drop_lines_after(path, 10)
    assert path.read_text() == lines[0] + "\n" + lines[1] + "\n" and "cut off" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    drop_lines_after(tmp_path / "none.jsonl", 10)
    assert not (tmp_path / "none.jsonl").exists()


def test_seconds_run_on_over_a_resume_without_the_pause(tmp_path):
    train(tmp_path, max_steps=4)
    first = rows(tmp_path)[-1]["seconds"]
    time.sleep(0.5)
    start = time.perf_counter()
    _, done = train(tmp_path, max_steps=8, resume="auto")
    took = time.perf_counter() - start
    seconds = [row["seconds"] for row in rows(tmp_path)]
    assert len(seconds) == 8 and seconds == sorted(seconds) and done["seconds"] == seconds[-1]
    assert first < seconds[-1] < first + took + 0.4  # saving after the last line counts, sleeping does not


def test_run_returns_its_last_line_with_steps_and_seconds(tmp_path):
    _, done = train(tmp_path, max_steps=5, log_every_steps=2)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 5]
    last = {k: v for k, v in rows(tmp_path)[-1].items() if k != "step"}
    assert done == {**last, "step": 5, "steps": 5} and set(last) >= {"loss", "ce", "lr"}


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, max_steps=4, log_every_steps=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = rows(tmp_path)
    assert set(events.Tags()["scalars"]) == set(written[0]) - {"step"}
    for name in ("loss", "ce", "lr"):
        points = [(e.step, e.value) for e in events.Scalars(name)]
        assert [s for s, _ in points] == [2, 4]
        assert [v for _, v in points] == pytest.approx([row[name] for row in written], rel=1e-6)

"""A run's folder proves that each epoch trained on every sample once, and where it did not, says what is wrong."""

import json
import re
from hashlib import blake2b

import pytest
import torch

from engine.tiny import IMAGES, Interrupted, TinyStream, train
from poisonshield.engine.audit import Epochs, audit
from poisonshield.engine.runfolder import RunFolder
from poisonshield.errors import CheckpointError


def first(epoch, batches):
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))[: 8 * batches]


EPOCHS = Epochs([f"image-{i}" for i in range(IMAGES)], [8] * 6, first, ended=lambda state: state["step"] // 6)


def told(folder):
    """(epoch, sound, words) of each finding, without its digest."""
    found = audit(RunFolder(folder), EPOCHS)
    return [(f.sound, re.sub(r", digest [0-9a-f]{16}$", "", f.text)) for f in found]


def rewrite(folder, change):
    """Let `change` alter each list `samples` of metrics.jsonl, in place."""
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        change(row.get("samples", []))
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add(row, count, *, plus=(), minus=()):
    """Change a row as if keys had been trained on once more, or not."""
    total = int(row["digest"], 16) + sum(value_of(k) for k in plus) - sum(value_of(k) for k in minus)
    row.update(count=row["count"] + count, digest=f"{total % 2**64:016x}")


def value_of(key):
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


WHOLE = [(True, f"epoch {e}: 48 samples, each once") for e in range(2)]
PART = (True, "epoch 2: 24 samples of 48; it has not ended, each once")


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{}, {"log_every_steps": 7}, {"max_steps": 3, "accumulate": 5}], ids=str)
def test_run_that_ended_is_proved(tmp_path, settings):
    train(tmp_path, **settings)
    assert told(tmp_path) == [*WHOLE, PART]


@pytest.mark.parametrize("at", [3, 7, 9, 14])
def test_run_that_died_is_proved_as_far_as_it_was_saved_and_whole_once_it_went_on(tmp_path, at):
    settings = {"checkpoint_every_steps": 2, "log_every_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stream=Interrupted(at, crash), **settings)
    saved = at // 2 * 2
    assert told(tmp_path)[: saved // 6] == WHOLE[: saved // 6] and all(sound for sound, _ in told(tmp_path))
    if saved % 6:
        n = 8 * (saved % 6)
        assert told(tmp_path)[-1] == (True, f"epoch {saved // 6}: {n} samples of 48; it has not ended, each once")
    train(tmp_path, resume="auto", **settings)
    assert told(tmp_path) == [*WHOLE, PART]


def test_run_that_was_made_longer_is_proved(tmp_path):
    train(tmp_path, max_steps=4)
    train(tmp_path, max_steps=15, resume="auto")
    assert told(tmp_path) == [*WHOLE, PART]


def test_samples_of_a_dropped_step_are_missing(tmp_path):
    train(tmp_path, stream=TinyStream(bad_steps=(2,)), nonfinite="skip", max_steps=6)
    assert told(tmp_path) == [
        (False, "epoch 0: 40 samples, 8 of 48 were not trained on (as in steps that engine.nonfinite: skip drops)")
    ]


def test_stream_that_gives_one_sample_twice_and_another_never_is_found_out_by_name(tmp_path):
    class Lossy(TinyStream):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch.replace(keys=(batch.keys[1], *batch.keys[1:])) if self.step == 3 else batch

    train(tmp_path, stream=Lossy(), max_steps=6)
    lost, twice = first(0, 6)[16:18].tolist()
    ((sound, words),) = told(tmp_path)
    assert not sound and words.startswith("epoch 0: 48 samples, but not each once: the digest is ")
    assert words.endswith(f": image-{lost} is missing and image-{twice} came twice")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [add(r, -1, minus=["image-7"]) for r in rows if r["epoch"] == 1],
         r"47 samples, 1 of 48 were not .*: image-7 is missing"),
        (lambda rows: [add(r, 1, plus=["image-9"]) for r in rows if r["epoch"] == 1],
         "49 samples, there are 48, so some came twice: image-9 came twice"),
        (lambda rows: [add(r, 2, plus=["image-9", "image-8"]) for r in rows if r["epoch"] == 1],
         "50 samples, there are 48, so some came twice"),
        (lambda rows: [r.update(digest=f"{1:016x}") for r in rows if r["epoch"] == 1],
         "48 samples, but not each once: the digest is 0{15}1, that of the keys [0-9a-f]{16}"),
    ],
)  # fmt: skip
def test_epoch_that_was_tampered_with_is_the_only_one_that_fails(tmp_path, change, words):
    train(tmp_path)
    rewrite(tmp_path, change)
    one, two, three = told(tmp_path)
    assert one == WHOLE[0] and three == PART and not two[0]
    assert re.fullmatch(f"epoch 1: {words}", two[1])


def test_epoch_that_nothing_tells_of_and_one_told_twice_fail(tmp_path):
    train(tmp_path)
    rewrite(tmp_path, lambda rows: rows.clear() if any(r["epoch"] == 1 for r in rows) else None)
    assert told(tmp_path) == [WHOLE[0], (False, "epoch 1: nothing tells what it trained on to its end."), PART]
    rewrite(tmp_path, lambda rows: rows.extend(r for r in [*rows] if r["epoch"] == 0))
    assert told(tmp_path)[0] == (False, "epoch 0: it is told 2 times that it ended.")


def test_last_epoch_that_ended_is_missed_though_no_later_one_is_told_of(tmp_path):
    """The checkpoint's position in the stream says how many ended."""
    train(tmp_path, max_steps=12)
    rewrite(tmp_path, lambda rows: rows.clear() if any(r["epoch"] == 1 for r in rows) else None)
    assert told(tmp_path) == [WHOLE[0], (False, "epoch 1: nothing tells what it trained on to its end.")]


def test_folder_that_tells_nothing_and_broken_metrics_are_refused_in_words(tmp_path):
    train(tmp_path, max_steps=2)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "samples": 3}\n' + metrics.read_text())
    with pytest.raises(CheckpointError, match="metrics.jsonl:1 is not readable as a line of metrics"):
        told(tmp_path)
    with pytest.raises(CheckpointError, match="tells of no epoch"):
        told(tmp_path / "empty")

"""A checkpoint is whole or not there, is what was written, and cannot run code; damage is seen and named."""

import datetime
import hashlib
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections import OrderedDict, namedtuple

import numpy
import pytest
import torch
import torch.distributed as dist

from poisonshield import collectives, files
from poisonshield.engine import checkpoint
from poisonshield.engine.checkpoint import (
    Checkpoints,
    load_plain,
    locate,
    random_states,
    read_index,
    restore_random_states,
    save_plain,
    together,
    verify,
)
from poisonshield.errors import CheckpointError, ConfigError, PoisonShieldError


def write(text="weights"):
    """A rank's part of a checkpoint: two files, one of them in a folder."""

    def write_into(folder):
        (folder / "method.pt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "shard.bin").write_bytes(bytes(range(256)) * 5000)  # more than one block of the hash

    return write_into


def filled(folder, *steps, keep=10):
    """Checkpoints of these steps."""
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, {"world_size": 1}, write(f"weights of {step}"))
    return checkpoints


def names(folder):
    return sorted(p.name for p in folder.iterdir())


DAMAGE = {
    "a file is cut off": lambda path: os.truncate(path / "deep" / "shard.bin", 100),
    "a bit flipped": lambda path: (path / "method.pt").write_text("weighty of 20"),
    "a file is missing": lambda path: (path / "method.pt").unlink(),
    "the index is missing": lambda path: (path / "index.json").unlink(),
    "the index is cut off": lambda path: (path / "index.json").write_text('{"step": 20, "fil'),
    "the index is a list": lambda path: (path / "index.json").write_text("[]"),
    "the index names no files": lambda path: (path / "index.json").write_text('{"step": 20}'),
    "the index says another step": lambda path: say_step(path, 21),
    "the hash of the index is cut off": lambda path: os.truncate(path / "index.sha256", 9),
}


def say_step(path, step):
    """Valid JSON, one number of which is another."""
    index = path / "index.json"
    index.write_text(index.read_text().replace(f'"step": {int(path.name[5:])}', f'"step": {step}'))


def test_index_holds_the_record_and_size_and_hash_of_every_file(tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(7, {"world_size": 3, "config": {"a": [1]}}, write())
    assert path == tmp_path / "step-00000007"
    index = json.loads((path / "index.json").read_text())
    assert (index["step"], index["world_size"], index["config"]) == (7, 3, {"a": [1]})
    shard = bytes(range(256)) * 5000
    assert index["files"] == {
        "method.pt": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "deep/shard.bin": {"bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()},
    }
    assert verify(path) == read_index(path) == index


def test_checkpoint_appears_in_one_move(tmp_path, monkeypatch):
    """Before the move all is in the draft and asked to be on disk, names too, and the final name does not exist."""
    seen, flushed, move, flush = [], [], os.replace, checkpoint.flush

    def watch(source, target):
        if str(target).endswith("step-00000005"):
            seen.append((names(source), target.exists(), verify(source)["step"], sorted({p.name for p in flushed})))
        move(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", watch)
    for module in (checkpoint, files):
        monkeypatch.setattr(module, "flush", lambda path: (flushed.append(path), flush(path)))
    monkeypatch.setattr(files, "draft_of", lambda path: path.with_name(f".{path.name}.tmp"))
    Checkpoints(tmp_path, keep=1).save(5, {}, write())
    on_disk = [".index.json.tmp", ".index.sha256.tmp", ".step-00000005.tmp", "deep", "method.pt", "shard.bin"]
    assert seen == [(["deep", "index.json", "index.sha256", "method.pt"], False, 5, on_disk)]
    assert names(tmp_path) == ["step-00000005"] and flushed[-1] == tmp_path


@pytest.mark.parametrize("moment", ["writing", "sealing"])
def test_failed_save_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch, moment):
    checkpoints = filled(tmp_path, 10, keep=1)

    def half(folder):
        (folder / "method.pt").write_text("half")
        raise OSError("No space left on device")

    if moment == "sealing":
        monkeypatch.setattr(checkpoint, "sha256", lambda path: half(path.parent))
    with pytest.raises(CheckpointError, match=r"rank 0, (writing|sealing).*No space left on device"):
        checkpoints.save(20, {}, half if moment == "writing" else write())
    monkeypatch.undo()
    assert checkpoints.steps() == [10] and checkpoints.last_good() == checkpoints.path(10)
    checkpoints.save(20, {}, write())  # what the failed attempt left is no obstacle
    assert checkpoints.last_good() == checkpoints.path(20) and names(tmp_path) == ["step-00000020"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_last_checkpoints_are_kept(tmp_path, keep):
    assert filled(tmp_path, 5, 10, 15, 20, keep=keep).steps() == [5, 10, 15, 20][-keep:]


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    checkpoints, there = filled(tmp_path, 10, keep=1), []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: there.append((path.name, checkpoints.steps())))
    checkpoints.save(20, {}, write())
    assert ("step-00000010", [10, 20]) in there


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path, caplog, damage):
    checkpoints = filled(tmp_path, 10, 20)
    DAMAGE[damage](checkpoints.path(20))
    with pytest.raises(CheckpointError, match="step-00000020"):
        verify(checkpoints.path(20))
    with caplog.at_level(logging.WARNING, "poisonshield"):
        assert checkpoints.last_good() == checkpoints.path(10)
    (warning,) = caplog.messages
    assert "step-00000020" in warning and "Falling back" in warning


def test_damage_says_which_file_and_how(tmp_path):
    path = filled(tmp_path, 20).path(20)
    os.truncate(path / "deep" / "shard.bin", 100)
    with pytest.raises(CheckpointError, match="shard.bin has 100 bytes, not 1280000"):
        verify(path)
    (path / "deep" / "shard.bin").unlink()
    with pytest.raises(CheckpointError, match="shard.bin is missing"):
        verify(path)
    (path / "deep" / "shard.bin").write_bytes(bytes(1_280_000))
    with pytest.raises(CheckpointError, match="the hash of deep/shard.bin is not the one in index.json"):
        verify(path)


def test_any_bit_of_the_index_that_flips_is_seen(tmp_path):
    """faults B: index.json, step 4 made 5, was resumed without a word."""
    path = filled(tmp_path, 4).path(4)
    for name in ("index.json", "index.sha256"):
        whole = (path / name).read_bytes()
        for place in range(0, len(whole), 7):
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match="step-00000004"):
                verify(path)
        (path / name).write_bytes(whole)
    assert verify(path)["step"] == 4


def test_checkpoint_without_a_hash_of_its_index_loads_and_its_step_is_held_to_its_name(tmp_path):
    """As earlier versions wrote them."""
    path = filled(tmp_path, 4).path(4)
    (path / "index.sha256").unlink()
    assert verify(path)["step"] == 4
    say_step(path, 5)
    with pytest.raises(CheckpointError, match="index.json says step 5"):
        verify(path)


def test_what_was_put_aside_does_not_pile_up(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        checkpoints.save(step, {}, write())
        time.sleep(0.01)  # the disk's clock is coarse
        checkpoints.go_back_to(0)
    assert names(tmp_path) == ["aside-step-00000006", "aside-step-00000007"]


FULL = """
import resource, sys, torch
from pathlib import Path
from poisonshield.engine.checkpoint import Checkpoints, save_plain
from poisonshield.errors import StorageError

folder, zeros = Path(sys.argv[1]), {"a": torch.zeros(10**6)}
ways = [
    lambda draft: save_plain(zeros, draft / "a.pt"),  # ours
    lambda draft: torch.save(zeros, draft / "a.pt"),  # a library's
    lambda draft: (draft / "a.bin").write_bytes(bytes(4 * 10**6)),
]
checkpoints = Checkpoints(folder, keep=2)
checkpoints.save(1, {}, lambda draft: (draft / "method.pt").write_text("weights"))
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
for write in ways:
    try:
        checkpoints.save(2, {}, write)
    except StorageError as err:
        print(str(err).splitlines()[0])
"""


def test_disk_that_takes_no_more_is_told_in_words_and_leaves_no_draft(tmp_path):
    """faults B: a full disk, "unexpected pos" in checkpoints."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("cannot be written: the file would be larger than" in line for line in lines)
    assert names(tmp_path) == ["step-00000001"] and verify(tmp_path / "step-00000001"), done.stderr


def test_where_all_are_damaged_the_run_does_not_start_over_silently(tmp_path):
    checkpoints = filled(tmp_path, 10, 20)
    DAMAGE["a file is missing"](checkpoints.path(10))
    DAMAGE["a bit flipped"](checkpoints.path(20))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps \[10, 20\]\)") as error:
        checkpoints.last_good()
    assert "start over with engine.resume=false" in str(error.value)


def test_where_there_never_was_one_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere", keep=1).last_good() is None
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / "aside-step-00000004").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert Checkpoints(tmp_path, keep=1).steps() == [] and Checkpoints(tmp_path, keep=1).last_good() is None


def test_newer_ones_are_put_aside_and_drafts_removed(tmp_path):
    checkpoints = filled(tmp_path, 10, 20, 30)
    (tmp_path / ".step-00000040.tmp").mkdir()
    checkpoints.go_back_to(10)
    assert names(tmp_path) == ["aside-step-00000020", "aside-step-00000030", "step-00000010"]
    assert (tmp_path / "aside-step-00000030" / "method.pt").read_text() == "weights of 30"
    assert checkpoints.steps() == [10]


def test_step_saved_again_puts_the_earlier_aside(tmp_path):
    checkpoints = filled(tmp_path, 10)
    checkpoints.save(10, {}, write("anew"))
    assert names(tmp_path) == ["aside-step-00000010", "step-00000010"]
    assert (checkpoints.path(10) / "method.pt").read_text() == "anew"


def test_path_to_resume_from_is_a_run_folder_a_checkpoints_folder_or_one_checkpoint(tmp_path):
    checkpoints = filled(tmp_path / "checkpoints", 10, 20)
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == checkpoints.path(20)
    assert locate(checkpoints.path(10)) == checkpoints.path(10)
    DAMAGE["a bit flipped"](checkpoints.path(20))
    assert locate(tmp_path) == checkpoints.path(10)
    with pytest.raises(CheckpointError, match="damaged"):
        locate(checkpoints.path(20))


@pytest.mark.parametrize("where", ["", "gone"])
def test_path_without_a_checkpoint_is_refused(tmp_path, where):
    with pytest.raises(CheckpointError, match="holds no checkpoint. engine.resume takes a run folder or one"):
        locate(tmp_path / where)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"stream": {"plan": [1, object()]}}, "stream.plan\\[1\\]: object is neither"),
        (numpy.zeros(2), "its value: ndarray is neither"),
        ({"a": numpy.float64(1.0)}, "a: float64 is neither"),
        ({"a": Pair(1, 2)}, "a: Pair is neither"),
        ({"a": {1, 2}}, "a: set is neither"),
    ],
    ids=["object", "array", "numpy scalar", "named tuple", "set"],
)
def test_what_cannot_be_loaded_back_safely_is_refused_at_save(tmp_path, value, words):
    with pytest.raises(CheckpointError, match=f"rank-0.pt cannot hold {words}"):
        save_plain(value, tmp_path / "rank-0.pt")
    assert not (tmp_path / "rank-0.pt").exists()


def test_tensors_and_plain_values_come_back_as_they_were(tmp_path):
    value = {
        "t": [torch.arange(3), torch.tensor(1.5, dtype=torch.bfloat16)], "p": torch.nn.Parameter(torch.ones(2)),
        "plain": (1, 2.5, "a", None, True, b"x"), 3: OrderedDict(b=-0.0), "empty": ({}, [], ()),
    }  # fmt: skip
    save_plain(value, tmp_path / "a.pt")
    back = load_plain(tmp_path / "a.pt")
    assert [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back.pop("t"), value.pop("t"), strict=True)] == [
        True,
        True,
    ]
    assert torch.equal(back.pop("p"), value.pop("p"))
    assert back == value and isinstance(back["plain"], tuple)


class Attack:
    """Unpickled naively, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_file_that_would_run_code_is_refused(tmp_path, writer):
    path, trace = tmp_path / "method.pt", tmp_path / "trace"
    if writer == "torch":
        torch.save({"a": Attack(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(trace), protocol=2))
    with pytest.raises(CheckpointError, match="method.pt cannot be read as tensors and plain values"):
        load_plain(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()  # it was a real attack


def test_missing_file_is_a_worded_error(tmp_path):
    with pytest.raises(CheckpointError, match="gone.pt cannot be read"):
        load_plain(tmp_path / "gone.pt")


def test_random_states_go_on_where_they_were_after_a_round_trip_over_disk(tmp_path):
    def draw():
        return (
            torch.randn(5).tolist(), [random.gauss(0, 1) for _ in range(3)],
            numpy.random.standard_normal(3).tolist(), random.random(), numpy.random.randint(0, 99),
        )  # fmt: skip

    random.gauss(0, 1)  # leaves the second of a pair for later, as
    numpy.random.standard_normal()  # this one does
    torch.randn(3)
    save_plain(random_states(), tmp_path / "random.pt")
    expected = draw()
    assert draw() != expected
    restore_random_states(load_plain(tmp_path / "random.pt"))
    assert draw() == expected


def test_error_on_purpose_keeps_its_kind_and_any_other_becomes_a_checkpoint_error():
    def fail(error):
        raise error

    with pytest.raises(ConfigError, match="^mine$"):
        checkpoint.together(lambda: fail(ConfigError("mine")), what="reading")
    with pytest.raises(CheckpointError, match="^rank 0, reading: 'gone'$"):
        checkpoint.together(lambda: fail(KeyError("gone")), what="reading")
    assert checkpoint.together(lambda: 5, what="reading", only_first=True) == 5


def _set_patience(seconds):
    """How long the group and its meeting point wait from now on; starting takes longer than this test wants to."""
    patience = datetime.timedelta(seconds=seconds)
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(patience, dist.group.WORLD)
    dist.distributed_c10d._get_default_store().set_timeout(patience)


def two_ranks(rank, world, folder):
    """Rank 0 takes longer than the group's timeout; then it fails so."""

    def work():
        time.sleep(5)
        return "made"

    def fail():
        raise ConfigError("no such poison")

    collectives.barrier()
    _set_patience(4)
    answer = together(work, what="making", only_first=True, patient=True)
    try:
        together(fail, what="making", only_first=True, patient=True)
    except PoisonShieldError as err:
        _set_patience(60)
        return answer, type(err).__name__, str(err)


@pytest.mark.dist
def test_ranks_wait_longer_than_the_group_would_for_work_that_one_does_alone(ask_two_ranks):
    first, second = ask_two_ranks(__name__).ranks
    assert first == ("made", "ConfigError", "no such poison")
    assert second[:2] == ("made", "CheckpointError") and "another rank" in second[2]

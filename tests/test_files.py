"""Files shared by processes: whole or not at all, bounded, and one owner of a folder."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from poisonshield import files
from poisonshield.errors import BusyError, ConfigError, DataError, StorageError
from poisonshield.files import LOCK, Lock, MadeList, read_bounded, tell_of_disk, write_whole


def hold(folder, ready, done):
    with Lock(folder, what="run"):
        ready.set()
        done.wait(60)


def start_holder(folder):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder, ready, done))
    process.start()
    assert ready.wait(60)
    return process, done


def count_to(path, number, times):
    for i in range(times):
        write_whole(path, json.dumps([number, i] * 50))


def test_small_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "old")

    def power_cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    monkeypatch.undo()
    write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.json"
    threads = [threading.Thread(target=count_to, args=(path, n, 300)) for n in range(2)]
    failed = []
    threading.excepthook, before = lambda args: failed.append(args.exc_value), threading.excepthook
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = before
    assert not failed and json.loads(path.read_text())[1] == 299 and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get)
def test_disk_that_refuses_is_told_with_path_and_space(tmp_path, monkeypatch, number):
    write_whole(tmp_path / "a.json", "old")

    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "flush", refuse)
    with pytest.raises(StorageError, match=r"a\.json cannot be written: .*MiB are free at"):
        write_whole(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), tell_of_disk(tmp_path):
        (tmp_path / "missing").read_text()


def test_pipe_folder_and_large_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for name, why in (("pipe", "no plain file"), (".", "no plain file"), ("large", "larger than 10"), ("no", "cannot")):
        with pytest.raises(DataError, match=f"manifest .*{why}"):
            read_bounded(tmp_path / name, max_bytes=10, what="manifest")
    assert read_bounded(tmp_path / "large", max_bytes=11, what="manifest") == bytes(11)


def test_only_what_was_made_here_may_be_replaced(tmp_path):
    made = MadeList(tmp_path)
    (tmp_path / "theirs.png").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    made.refuse_others(["new.png"])
    made.add(["new.png"])
    (tmp_path / "new.png").write_text("x")
    made.add(["sheets/a.png"])
    made.refuse_others(["new.png", "other.png", "sheets/a.png"])
    for name in ("theirs.png", "link"):
        with pytest.raises(ConfigError, match=f"{name} is there and was not made here"):
            made.refuse_others(["new.png", name])
    assert made.read() == {"new.png", "sheets/a.png"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"made": "a"}', '{"made": ["../a"]}', '{"made": ["/a"]}', '{"made": [1]}']
)
def test_damaged_list_of_what_was_made_is_refused(tmp_path, text):
    (tmp_path / files.MADE_LIST).write_text(text)
    with pytest.raises(ConfigError, match="not readable as the names of what was made here"):
        MadeList(tmp_path).read()


def test_folder_in_use_is_refused_with_its_owner(tmp_path):
    process, done = start_holder(tmp_path)
    with pytest.raises(BusyError, match=f"process {process.pid} on .* writes this run"), Lock(tmp_path, what="run"):
        pass
    done.set()
    process.join()
    with Lock(tmp_path, what="run"):
        assert (tmp_path / LOCK).exists()
    assert os.listdir(tmp_path) == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    process, _ = start_holder(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()
    with Lock(tmp_path, what="run"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_number_of_a_dead_process_that_another_has_now_counts_as_dead(tmp_path):
    process, _ = start_holder(tmp_path)
    process.kill()
    process.join()
    owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**owner, "pid": os.getppid()}))
    with Lock(tmp_path, what="run"):
        pass


@pytest.mark.parametrize("age, free", [(0.0, False), (2 * files.STALE_AFTER, True)])
def test_lock_from_another_host_is_known_by_its_age(tmp_path, age, free):
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "5", "boot": "b"}))
    then = time.time() - age
    os.utime(tmp_path / LOCK, (then, then))
    if free:
        with Lock(tmp_path, what="grid"):
            pass
    else:
        with pytest.raises(BusyError, match="process 1 on elsewhere"), Lock(tmp_path, what="grid"):
            pass


def test_requeued_slurm_job_takes_its_own_lock_from_a_lost_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / LOCK).write_text(json.dumps({"host": "lost-node", "pid": 1, "slurm": ["77", 0]}))
    with pytest.raises(BusyError, match="lost-node"), Lock(tmp_path, what="run"):  # another step of this very start
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lock(tmp_path, what="run"):
        pass


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_lock_that_says_nothing_is_known_by_its_age(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(BusyError, match="an unknown process"), Lock(tmp_path, what="run"):
        pass
    os.utime(tmp_path / LOCK, (0, 0))
    with Lock(tmp_path, what="run"):
        pass


def test_lock_that_was_taken_anew_meanwhile_is_given_back(tmp_path, monkeypatch):
    """Between judging a dead owner's lock and moving it aside, another process took it."""
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(tmp_path / LOCK, (0, 0))
    rename = os.rename

    def slow(source, target):
        (tmp_path / LOCK).write_text(json.dumps({"host": "third", "pid": 2}))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", slow)
    with pytest.raises(BusyError, match="process 2 on third"), Lock(tmp_path, what="run"):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "third" and os.listdir(tmp_path) == [LOCK]


def test_lock_that_another_took_over_is_not_removed(tmp_path):
    with Lock(tmp_path, what="run"):
        (tmp_path / LOCK).write_text(json.dumps({"host": "third", "pid": 2, "token": "x"}))
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "third"


def test_owner_touches_its_lock_and_may_take_it_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.01)
    with Lock(tmp_path, what="run"):
        os.utime(tmp_path / LOCK, (0, 0))
        with Lock(tmp_path, what="run"):
            deadline = time.monotonic() + 30
            while os.stat(tmp_path / LOCK).st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert os.stat(tmp_path / LOCK).st_mtime > 0  # given back by the outer one only
    assert os.listdir(tmp_path) == []


def test_of_many_processes_that_start_together_one_gets_the_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from poisonshield.files import Lock\n"
        "with Lock(Path(sys.argv[1]), what='run'): print('mine', flush=True); sys.stdin.read()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(p.poll() is None for p in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    results = [p.communicate() for p in started]
    assert sorted(out for out, _ in results) == [""] * 5 + ["mine\n"]
    assert all("BusyError" in err for out, err in results if not out)

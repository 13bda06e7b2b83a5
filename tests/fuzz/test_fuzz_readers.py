"""No file that anybody can make leads a reader to anything but its answer or an error of ours, soon, in little memory.

A line of figures for each reader: `pytest tests/fuzz -s`, and 10,000 inputs for each with `-m slow`. What a reader does
not take as it should is kept and named in the failure; `python tests/fuzz/child.py` with the same seed makes it again.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import mutate
import pytest
from child import MEBIBYTES, SECONDS
from readers import READERS

HERE = Path(__file__).parent


def feed(folder, count, seed, names, *, timeout):
    """Figures of each reader, by name, from a process of its own."""
    command = [sys.executable, str(HERE / "child.py"), str(folder), str(count), str(seed), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    found = {figures["reader"]: figures for figures in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(names), f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return found


def check(figures, count):
    told = {key: value for key, value in figures.items() if key != "faults"}
    print(", ".join(f"{key} {value}" for key, value in told.items()))
    assert not figures["faults"], "\n".join(figures["faults"])
    assert figures["inputs"] == figures["accepted"] + figures["refused"] == count
    assert figures["refused"] > count // 20, "mutations that a reader takes test nothing"
    assert figures["slowest_s"] < SECONDS and figures["peak_mib"] < MEBIBYTES


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """150 inputs for every reader, in one process."""
    return feed(tmp_path_factory.mktemp("fuzz"), 150, 0, list(READERS), timeout=200)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(short, name):
    check(short[name], 150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_mutated_files_are_read_or_refused(tmp_path, name):
    check(feed(tmp_path, 10_000, 1, [name], timeout=3500)[name], 10_000)


@pytest.mark.parametrize("name", READERS)
def test_a_shell_closes_what_it_opened(tmp_path, name):
    """Unchanged, a sound file comes out of every shell as a file that its reader takes."""
    reader = READERS[name]
    for sound in reader.seeds(tmp_path):
        for shell in reader.shells:
            inner, close = shell(sound)
            reader.feed(close(inner), tmp_path)


def test_mutations_are_drawn_from_the_seed_and_change_something():
    seeds = [bytes(range(256)) * 4, b'{"a": 12, "b": [1.5, "x"]}']
    drawn = [[mutate.mutate(seeds, (), random.Random(f"{s} {i}")) for i in range(200)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(data in seeds for data in drawn[0]) < 10 and len(set(drawn[0])) > 180


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("os.system('true')", "does os.system"),
        ("__import__('subprocess').run(['true'])", "does subprocess.Popen"),
        ("open('/tmp/poisonshield-fuzz', 'w')", "does open"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "does socket"),
        ("__import__('pickle').loads(b'cos\\nsystem\\n.')", "does pickle.find_class"),
        ("[][0]", "builtins.IndexError"),
        ("bytearray(2**33)", "builtins.MemoryError"),
        ("__import__('time').sleep(60)", "builtins.TimeoutError"),
    ],
)
def test_the_watch_sees_what_a_reader_must_not_do(tmp_path, bad, told):
    code = (
        f"import sys, os; sys.path.insert(0, {str(HERE)!r}); import child, readers\n"
        "child.SECONDS = 0.5\n"
        f"feed = lambda data, place: data == b'sound' or {bad}\n"
        "readers.READERS['bad'] = readers.Reader(lambda _: [b'sound'], feed)\n"
        f"child.main(child.Path({str(tmp_path)!r}), 3, 0, ['bad'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    figures = json.loads(done.stdout)
    assert len(figures["faults"]) == 3 and told in figures["faults"][0], (figures, done.stderr)

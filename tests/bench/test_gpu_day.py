"""The ten-minute script for a GPU: facts survive whatever ends a step, and the exit code tells what failed."""

import csv
import json
import subprocess
import sys
import time

import gpu
import pytest
import torch

SELF = [sys.executable, "-c"]
SAY = "import json, os; open(os.environ['FACTS'], 'a').write(json.dumps({'fact': 'a', 'v': 1}) + '\\n'); "


def facts(folder):
    return [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]


def run(folder, *steps, seconds=60.0):
    failed = gpu.run_all(steps, folder, seconds=seconds, toy=False)
    return failed, facts(folder)


def test_facts_are_there_whatever_ends_a_step(tmp_path):
    steps = (
        gpu.Step("good", 20, [*SELF, SAY]),
        gpu.Step("bad", 20, [*SELF, SAY + "os._exit(3)"]),
        gpu.Step("late", 4, [*SELF, SAY + "import time; time.sleep(60)"]),
        gpu.Step("lost", 20, ["no-such-program"]),
    )
    failed, found = run(tmp_path, *steps)
    assert failed == ["bad", "late", "lost"]
    results = [f["result"] for f in found if f["fact"] == "step"]
    assert results == ["done", "exit code 3, see log.txt", "stopped after 4 s", "no-such-program is not on PATH"]
    assert [f["fact"] for f in found] == ["a", "step", "a", "step", "a", "step", "step"]
    assert "===== late" in (tmp_path / "log.txt").read_text()


def test_a_step_that_is_stopped_takes_its_children_along(tmp_path):
    sleeper = "import time; time.sleep(60)  # child of a step"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    run(tmp_path, gpu.Step("parent", 3, [*SELF, parent]))
    time.sleep(0.3)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "child of a step" not in listed


def test_steps_without_time_left_are_told(tmp_path):
    failed, found = run(tmp_path, gpu.Step("first", 20, [*SELF, "pass"]), seconds=0.5)
    assert failed == ["first"] and found[0]["result"] == "no time left"


def test_the_most_telling_steps_come_first_and_each_has_a_cap(tmp_path):
    steps = gpu.steps(tmp_path, toy=False)
    names = [s.name for s in steps]
    assert names[:4] == ["environment", "ops", "gpu tests", "pillow"] and names[-2:] == ["memcheck", "racecheck"]
    assert len(set(names)) == len(names) and all(0 < s.cap <= 120 for s in steps)


def test_an_unknown_step_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--only", "fly"])
    assert "no step is called fly. Known: environment, ops" in capsys.readouterr().err


def test_facts_become_tables(tmp_path):
    run(tmp_path, gpu.Step("one", 20, [*SELF, SAY]), gpu.Step("two", 20, [*SELF, SAY]))
    (tmp_path / "bench.csv").write_text("case,provider\nx,y\n")
    made = gpu.write_tables(tmp_path, tmp_path / "results")
    assert [p.name for p in made] == ["gpu_a.csv", "gpu_step.csv", "gpu_bench.csv"]
    assert [r["step"] for r in csv.DictReader(made[1].open())] == ["one", "two"]
    assert list(csv.DictReader(made[0].open())) == [{"v": "1"}] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_what_it_needs(tmp_path):
    assert gpu.main([str(tmp_path), "--only", "environment"]) == 1
    assert "needs a CUDA device" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["environment", "ops", "pillow", "whole steps", "collectives", "inversion"])
def test_own_steps_work_at_toy_size(tmp_path, name):
    assert gpu.main([str(tmp_path), "--toy", "--only", name]) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    found = [f for f in facts(tmp_path) if f["fact"] != "step"]
    assert found and all(f["ok"] and f["device"] and f["torch"] for f in found)

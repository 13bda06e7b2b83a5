"""Everything that waits for a GPU, in ten minutes: `python tests/bench/gpu.py [folder] [--minutes 9.5]`.

Each step is a process of its own with a cap. What it finds is added to `facts.jsonl` at once, a line a fact, and rows
of `poisonshield bench` to `bench.csv`, so that whatever ends the run keeps what there is. The most telling steps come
first. Exit code 1 if a step failed, ran into its cap, or found no time.

--only NAME runs some of the steps. --toy runs them small, on the CPU, to see that they work. --tables FOLDER writes the
facts of a run as CSV files into tests/bench/results/, each row with the hardware and the versions.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
CHECKER = "compute-sanitizer"


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and whether there is a toy form of it."""

    name: str
    cap: float
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    toy: bool = True


def own(name):
    """A step of gpu_steps.py."""
    return [sys.executable, str(HERE / "gpu_steps.py"), name]


def command(*arguments):
    """Of the package."""
    return [sys.executable, "-m", "poisonshield.cli", *arguments]


def bench(what, folder, toy, *more):
    """A benchmark whose rows go to bench.csv."""
    size = ["--quick", "--rounds", "1", "--device", "cpu", "--allow-missing"] if toy else ["--device", "cuda", *more]
    return command("bench", what, *size, "--out", str(folder / "bench.csv"))


def train(folder, name, toy, *overrides):
    """A short training on the bundled sample of CIFAR-10."""
    how = ["engine.device=cpu", "engine.max_steps=2"] if toy else ["engine.precision=bf16", "data.workers=4"]
    run = f"run.dir={folder / name}"
    return command("train", str(ROOT / "configs/defend/vespr_cifar10_mini.yaml"), run, *how, *overrides)


def steps(folder, toy):
    """All of them, in order."""
    plain = ["method={name: supervised}", "defenses=[]"]
    gpu_tests = [sys.executable, *"-m pytest -q -m gpu -p no:cacheprovider -rs".split(), str(ROOT / "tests")]
    # Else torch's allocator hides what lies beyond a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = [CHECKER, "--error-exitcode", "9", "--tool"]
    return [
        Step("environment", 30, own("environment")),
        Step("ops", 120, own("ops")),
        Step("gpu tests", 60, gpu_tests, toy=False),
        Step("pillow", 30, own("pillow")),
        Step("whole steps", 90, own("whole_steps")),
        Step("bench ops", 100, bench("ops", folder, toy, "--rounds", "20", "--cap", "6"), toy=False),
        Step("bench vespr", 40, bench("vespr", folder, toy, "--rounds", "8", "--cap", "12")),
        Step("bench stream", 60, bench("stream", folder, toy, "--rounds", "3", "--cap", "10", "--workers", "8")),
        Step("bench simclr", 40, bench("simclr", folder, toy, "--rounds", "3", "--cap", "12")),
        Step("collectives", 20, own("collectives")),
        Step("inversion", 60, own("inversion")),
        Step("bench invert", 40, bench("invert", folder, toy, "--rounds", "8", "--cap", "8")),
        Step("train vespr", 60, train(folder, "vespr", toy)),
        Step("train supervised", 30, train(folder, "supervised", toy, *plain)),
        Step("memcheck", 90, [*checked, "memcheck", *own("ops")], uncached, toy=False),
        Step("racecheck", 60, [*checked, "racecheck", *own("pillow")], toy=False),
    ]


def run_all(chosen, folder, *, seconds, toy):
    """Run the steps within so many seconds; the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + seconds, []
    for step in chosen:
        found = run_step(step, folder, left=end - time.monotonic(), toy=toy)
        append(folder / "facts.jsonl", found)
        print(f"{step.name:18s} {found['result']:28s} {found['seconds']:6.1f} s", flush=True)
        if found["result"] != "done":
            failed.append(step.name)
    return failed


def run_step(step, folder, *, left, toy):
    """One step in a process group of its own, which ends with it: {"fact": "step", "step", "result", "seconds"}."""
    start = time.monotonic()
    seconds = min(step.cap * (4 if toy else 1), left)
    if seconds < 1:
        result = "no time left"
    elif shutil.which(step.command[0]) is None:
        result = f"{step.command[0]} is not on PATH"
    else:
        result = run_command(step, folder, seconds, toy)
    return {"fact": "step", "step": step.name, "result": result, "seconds": round(time.monotonic() - start, 2)}


def run_command(step, folder, seconds, toy):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "FACTS": str(folder / "facts.jsonl"), "TOY": "1" if toy else ""} | step.env
    with open(folder / "log.txt", "a") as log:
        log.write(f"\n===== {step.name}\n")
        log.flush()
        process = subprocess.Popen(step.command, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"exit code {code}, see log.txt"


def append(path, fact):
    """One more line."""
    with open(path, "a") as file:
        file.write(json.dumps(fact, default=str) + "\n")


def write_tables(folder, results):
    """A CSV for each kind of fact, and the rows of the benchmarks; the files."""
    kinds = {}
    for line in (folder / "facts.jsonl").read_text().splitlines():
        fact = json.loads(line)
        kinds.setdefault(fact.pop("fact"), []).append(fact)
    results.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, rows in kinds.items():
        made.append(results / f"gpu_{kind.replace(' ', '_')}.csv")
        with made[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    if (folder / "bench.csv").is_file():
        made.append(Path(shutil.copy(folder / "bench.csv", results / "gpu_bench.csv")))
    return made


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench-gpu"))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--tables", action="store_true", help="write the folder's facts as CSV files, and run nothing")
    given = parser.parse_args(arguments)
    folder = given.folder.resolve()
    if given.tables:
        print(*write_tables(folder, RESULTS), sep="\n")
        return 0
    every = steps(folder, given.toy)
    if unknown := set(given.only or ()) - {s.name for s in every}:
        parser.error(f"no step is called {', '.join(sorted(unknown))}. Known: {', '.join(s.name for s in every)}")
    chosen = [s for s in every if (not given.only or s.name in given.only) and (s.toy or not given.toy)]
    failed = run_all(chosen, folder, seconds=60 * given.minutes, toy=given.toy)
    print(f"facts: {folder / 'facts.jsonl'}" + (f"\nfailed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

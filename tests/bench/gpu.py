"""Everything that waits for a GPU, in one command: `python tests/bench/gpu.py [folder]`.

Runs the tests marked `gpu`, compute-sanitizer over them where it is installed, and `poisonshield bench ops`; then
prints each figure beside the bar that it has to reach: a share of the same run's copy bandwidth, or a ratio to a peer.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

# (case, provider, what is compared, must, stretch); a peer's name means "this many times faster than it".
BARS = [
    ("jpeg forward", "triton", "% copy", 50, 75),
    ("jpeg forward+backward", "triton", "compiled", 1.5, 4),
    ("jpeg forward+backward", "triton", "kornia", 10, 30),
    ("jpeg exact", "triton", "% copy", 35, 55),
    ("pgd linf step", "cuda", "% copy", 90, 95),
    ("pgd linf step", "cuda", "textbook, torch.compile", 0.95, 1),
    ("pgd linf step", "cuda", "textbook, eager", 3.5, 4),
    ("pgd l2 step", "cuda", "% copy", 50, 85),
    ("pgd l2 step", "cuda", "textbook, torch.compile", 1.5, 2),
    ("q_sample", "cuda", "% copy", 70, 85),
    ("masked loss+gradient", "cuda", "% copy", 70, 85),
    ("masked loss+gradient", "cuda", "eager, torch.compile", 1.3, 2),
]


def main(folder):
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device, and torch sees none.")
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "bench.csv"
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", HERE.parent / "ops"]
    failed = subprocess.run(tests, check=False).returncode
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        failed |= subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "1", *tests], check=False).returncode
    if not sanitizer:
        print("compute-sanitizer is not on PATH: not run")
    command = [sys.executable, "-m", "poisonshield.cli", "bench", "ops", "--rounds", "50", "--out", out]
    subprocess.run([*command, "--plot", folder / "bench.png"], check=True)
    with out.open() as file:
        rows = {(r["case"], r["provider"]): r for r in csv.DictReader(file)}
    for case, provider, against, must, stretch in BARS:
        row, peer = rows.get((case, provider)), rows.get((case, against))
        if not row or not row["p50_ms"] or (against != "% copy" and not (peer and peer["p50_ms"])):
            print(f"{case:24s} {provider:8s} not measured: {row['note'] if row else 'no such row'}")
            continue
        value = float(row["copy_pct"]) if against == "% copy" else float(peer["p50_ms"]) / float(row["p50_ms"])
        verdict = "stretch" if value >= stretch else "must" if value >= must else "BELOW"
        print(f"{case:24s} {provider:8s} p50 {float(row['p50_ms']):9.4f} ms  {value:8.2f} {against} ({must}) {verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench-gpu"))

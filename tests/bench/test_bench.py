"""The benchmark harness: what it records, what it refuses. No time is asserted."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from poisonshield.bench import benchmarks, harness
from poisonshield.bench.harness import Case, Provider, WrongResult, measure
from poisonshield.cli import app
from poisonshield.errors import ConfigError, DataError


@pytest.fixture(scope="module", params=["uncompiled", pytest.param("compiled", marks=pytest.mark.slow)], autouse=True)
def compiled(request):
    """What the harness records does not depend on what torch.compile does: by default its functions run as they are.
    That the compiled ops are right is for contracts/test_ops.py and ops/test_jpeg.py; here with -m slow."""
    with torch.compiler.set_stance("force_eager" if request.param == "uncompiled" else "default"):
        yield


@pytest.fixture
def quick_copy(monkeypatch):
    """The speed of copying is made up, where no row is looked at."""
    monkeypatch.setattr("poisonshield.bench.copy_bandwidth", lambda device: 1e10)


def run(*arguments):
    return CliRunner().invoke(
        app, ["bench", "ops", "--quick", "--rounds", "2", *map(str, arguments)], catch_exceptions=False
    )


def test_rows_are_appended_with_all_that_a_claim_needs(tmp_path):
    out, figure = tmp_path / "bench.csv", tmp_path / "bench.png"
    done = run("--op", "diffusion", "--op", "pgd", "--out", out, "--plot", figure)
    assert done.exit_code == 0 and "q_sample" in done.output
    rows = list(csv.DictReader(out.open()))
    assert {r["case"] for r in rows} == {"q_sample", "masked loss+gradient", "pgd linf step", "pgd l2 step"}
    ours = [r for r in rows if r["provider"] == "reference"]
    assert len(ours) == 4
    for r in ours:
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert int(r["launches"]) > 0 and int(r["ideal_bytes"]) > 0
        assert r["torch"] == torch.__version__ and r["device"] and r["date"] and float(r["copy_pct"]) > 0
    skipped = [r for r in rows if r["provider"] == "cuda"]
    assert torch.cuda.is_available() or all(r["note"].startswith("skipped: ") and not r["p50_ms"] for r in skipped)
    assert figure.stat().st_size > 1000
    run("--op", "pgd", "--out", out)
    again = list(csv.DictReader(out.open()))
    assert again[: len(rows)] == rows and len(again) > len(rows)


def test_jpeg_is_benchmarked_beside_kornia(tmp_path):
    pytest.importorskip("kornia")
    out = tmp_path / "bench.csv"
    assert run("--op", "jpeg", "--out", out).exit_code == 0
    rows = {(r["case"], r["provider"]): r for r in csv.DictReader(out.open())}
    assert {c for c, _ in rows} == {"jpeg forward", "jpeg forward+backward", "jpeg exact"}
    assert "dB to libjpeg" in rows["jpeg forward", "kornia"]["note"]
    assert rows["jpeg exact", "compiled"]["note"] == "equal"


def test_every_op_has_a_benchmark_and_others_are_refused(tmp_path):
    assert benchmarks() == ["augment", "diffusion", "jpeg", "pgd"]
    with pytest.raises(ConfigError, match="no benchmark for fft. Known: augment, diffusion, jpeg, pgd"):
        run("--op", "fft", "--out", tmp_path / "bench.csv")


def test_a_wrong_provider_is_not_timed():
    def wrong():
        raise WrongResult("off by 3")

    case = Case("sum", (1,), 4, "a", [Provider("a", lambda: 1), Provider("b", lambda: 2, wrong)])
    with pytest.raises(WrongResult, match="off by 3"):
        measure(case, rounds=1, copy=1e9)


def test_memory_and_operations_are_counted():
    x = torch.ones(1 << 20)
    extra, launches = harness._count(lambda: (x + 1).mul_(2))
    assert extra == pytest.approx(4, abs=0.1) and launches == 2


def test_another_files_columns_are_refused(tmp_path, quick_copy):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has other columns"):
        run("--op", "pgd", "--out", out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_what_it_needs():
    script = Path(__file__).parent / "gpu.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr

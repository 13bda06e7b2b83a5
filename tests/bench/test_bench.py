"""The benchmark harness: what it records, what it refuses. No time is asserted."""

import csv
import re
import time

import pytest
import torch
from typer.testing import CliRunner

from poisonshield.bench import benchmarks, harness
from poisonshield.bench.harness import Case, Provider, Target, WrongResult, measure
from poisonshield.bench.session import Session
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
    monkeypatch.setattr("poisonshield.bench.session.copy_bandwidth", lambda device: 1e10)


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


def two(slow=0.0, **settings):
    """A case of two providers, of which the second takes a while, and a third that is not installed."""
    providers = [
        Provider("quick", lambda: time.sleep(0.001)),
        Provider("slow", lambda: time.sleep(slow)),
        Provider("theirs", None, missing="theirs is not installed"),
    ]
    return Case("case", (1,), 0, "slow", providers, counted=False, **settings)


def test_rows_of_a_case_are_kept_when_the_next_one_fails(tmp_path):
    def wrong():
        raise WrongResult("off by 3")

    out = tmp_path / "bench.csv"
    session = Session(out=out, rounds=2)
    session.time(two())
    with pytest.raises(WrongResult):
        session.time(Case("next", (1,), 0, "a", [Provider("a", lambda: 1, wrong)]))
    assert [r["provider"] for r in csv.DictReader(out.open())] == ["quick", "slow", "theirs"]


def test_a_cap_ends_rounds_and_says_so():
    quick, slow, _ = measure(two(slow=0.05), rounds=20, cap=0.2)
    assert quick.note == "" and quick.times
    assert re.fullmatch(r"[1-4] of 20 rounds in 0.2 s", slow.note) and slow.times


def test_one_whose_first_run_takes_too_long_is_not_timed():
    _, slow, _ = measure(two(slow=0.05), rounds=3, cap=0.04)
    assert slow.times is None and re.match(r"stopped: check and first run took 0\.\d s, the cap is 0.04 s", slow.note)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target("quick", "slow", 2), "met"),
        (Target("quick", "slow", 1000), "BELOW"),
        (Target("quick", "slow", 1, most=True), "met"),
        (Target("slow", "quick", 2, most=True), "BELOW"),
        (Target("quick", "theirs", 2), ""),
    ],
)
def test_a_figure_is_judged_by_its_target(target, verdict):
    session = Session(rounds=3, allow_missing=True)
    rows = session.time(two(slow=0.02, targets=[target]))
    told = next(r.verdict for r in rows if r.provider == target.provider)
    assert told.partition(":")[0] == verdict and session.close() == (verdict == "BELOW")
    assert not verdict or f"{target.must:g} wanted" in told


def test_what_is_skipped_fails_unless_it_may(capsys):
    session, lenient = Session(rounds=1), Session(rounds=1, allow_missing=True)
    for each in (session, lenient):
        each.time(two())
    assert session.close() == 1 and lenient.close() == 0
    told = capsys.readouterr().out
    assert "case: theirs skipped: theirs is not installed" in told and "--allow-missing" in told


def test_backends_of_another_device_are_no_failure():
    providers = [Provider("reference", lambda: 1), Provider("cuda", None, missing="no CUDA device")]
    session = Session(rounds=1)
    session.time(Case("sum", (1,), 0, "reference", providers, counted=False))
    assert session.close() == 0


def test_quick_sizes_are_not_judged():
    session = Session(rounds=1, quick=True, allow_missing=True)
    session.time(two(slow=0.02, targets=[Target("quick", "slow", 1000)]))
    assert session.close() == 0


def test_the_command_fails_where_the_session_does(tmp_path, quick_copy, monkeypatch):
    monkeypatch.setattr("poisonshield.bench.pgd.cases", lambda device, quick: [two()])
    assert run("--op", "pgd", "--out", tmp_path / "a.csv").exit_code == 1
    assert run("--op", "pgd", "--out", tmp_path / "b.csv", "--allow-missing").exit_code == 0


def test_items_are_counted_by_the_second():
    (row,) = measure(
        Case("c", (1,), 0, "a", [Provider("a", lambda: time.sleep(0.01))], items=5, counted=False), rounds=3
    )
    assert row.items_per_s == pytest.approx(5 / (row.p50_ms / 1e3)) and row.launches is None and row.gb_per_s is None

"""Every Triton kernel compiles for sm_90 without a GPU, keeps everything in registers, and stays within its budget."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = HERE.parents[1] / "poisonshield" / "ops"

# Registers of a thread and barriers, at most; 255 registers are all there are. The tile kernels of JPEG trade them for
# one pass; their tuning waits for a GPU. Newest and oldest Triton differ by half, hence the room.
BUDGETS = {
    "linf_step": (40, 0),
    "linf_step_all": (88, 2),
    "linf_start": (40, 0),
    "linf_start_all": (80, 2),
    "ball_sums": (64, 8),
    "ball_step": (48, 10),
    "ball_step_all": (88, 10),
    "noise_sums": (80, 8),
    "ball_start": (80, 8),
    "noising": (32, 0),
    "noising_drawn": (80, 0),
    "loss": (56, 2),
    "loss_drawn": (80, 2),
    "combine": (56, 0),
    "split_gradient": (80, 0),
    "code_tiles": (176, 48),
    "luma_gradient": (176, 24),
    "gather_gradient": (255, 72),
}
WIDE = ("linf_step", "noising", "loss_given", "ball_sums")


# Variants of a kernel that compile for seconds: by default its plainest and its heaviest form, all with -m slow.
VARIANTS = "444_(exact|fourier)|420_fourier$"
ANY = (255, float("inf"))  # a kernel without a row must only stay in registers


def budget(case):
    """That of the longest name which begins the case's."""
    return BUDGETS.get(max((n for n in BUDGETS if case.startswith(n)), key=len, default=None), ANY)


def compile_all(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "aot.py", *arguments],
        capture_output=True,
        text=True,
        env=clean | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels(lines):
    """The lines that tell what a kernel uses."""
    return [line for line in lines if "ones" not in line]


def failures_at_one(lines):
    """{room, case and arguments: what the compiler said} of kernels that do not compile where integers are 1."""
    return {(line["room"], line["case"], *line["ones"]): line["error"] for line in lines if line.get("error")}


def check(rows):
    assert {r["room"] for r in rows} == {p.parent.name for p in OPS.glob("*/triton_kernels.py")}
    for row in rows:
        registers, barriers = budget(row["case"])
        assert row["cubin"] > 0 and row["target"].startswith("sm_90"), row
        assert (row["local"], row["stack"], row["spills"]) == (0, 0, 0), row
        assert row["reg"] <= registers and row["barriers"] <= barriers, row
        assert row["wide_loads"] > 0 or not row["case"].startswith(WIDE), row


@pytest.fixture(scope="module")
def lines():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    return compile_all("--without", VARIANTS)


@pytest.fixture(scope="module")
def rows(lines):
    return kernels(lines)


@pytest.mark.slow
def test_every_variant_stays_within_its_budget(rows):
    every = compile_all("--each-one")
    check(kernels(every))
    assert {r["case"] for r in rows} < {r["case"] for r in kernels(every)}
    assert not failures_at_one(every)


def test_every_kernel_compiles_where_its_integers_are_one(lines, rows):
    """An image of height 1, one sample, one channel: the JIT then compiles a constant in place of a number."""
    tried = {line["case"] for line in lines if "ones" in line}
    assert len(tried) >= 11 and tried <= {r["case"] for r in rows}
    assert not failures_at_one(lines)


def test_kernels_stay_within_their_budgets(rows):
    check(rows)


def test_every_kernel_that_is_launched_is_compiled(rows):
    sources = [p.read_text() for p in OPS.glob("*/triton_kernels.py")]
    kernels = {n for text in sources for n in re.findall(r"@triton\.jit\ndef (\w+)", text)}
    launched = {n for text in sources for n in re.findall(r"^\s+(\w+)\[", text, re.MULTILINE)} & kernels
    cases = [r["case"] for r in rows]
    assert len(launched) >= 11
    assert not [n for n in launched if not any(c.startswith({"loss_and_gradient": "loss"}.get(n, n)) for c in cases)]


def test_every_launch_of_jpeg_states_the_options_it_is_compiled_with():
    """Without them fusion of multiply and add is Triton's default, which another version changes."""
    text = (OPS / "jpeg" / "triton_kernels.py").read_text()
    launches = re.findall(r"^\s+(\w+)\[s\w*\.\w+\]\((.*?)\)(?:  # fmt: skip)?$", text, re.MULTILINE | re.DOTALL)
    assert {"code_tiles", "combine", "split_gradient", "luma_gradient", "gather_gradient"} == {n for n, _ in launches}
    assert not [n for n, arguments in launches if "_OPTIONS" not in arguments]


def test_the_check_can_fail(rows):
    with pytest.raises(AssertionError):
        check([*rows[1:], rows[0] | {"stack": 8}])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_both_ends_of_the_triton_range(version, tmp_path):
    """The oldest and the newest Triton that torch 2.11 to 2.15 bring; fetched by pip."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, f"triton=={version}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch triton {version}: {done.stderr[-200:]}")
    found = kernels(compile_all(PYTHONPATH=str(tmp_path)))
    assert {r["triton"] for r in found} == {version}
    check(found)

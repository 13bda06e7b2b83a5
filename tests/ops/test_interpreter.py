"""Triton kernels are either interpreted or compiled in a process of tests, so that neither passes for the other."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
OPS = HERE.parents[1] / "poisonshield" / "ops"
TESTS = ("test_pgd_triton.py::test_autograd_sees_the_change", "test_gpu.py::test_another_stream")


@pytest.fixture
def run(tmp_path):
    """pytest on tests in a process that is told of a GPU; gives what it says."""
    (tmp_path / "told_of_a_gpu.py").write_text("import torch\n\ntorch.cuda.is_available = lambda: True\n")

    def started(*tests, **environment):
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        place = os.pathsep.join([str(tmp_path), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, *"-m pytest -q -rs -p told_of_a_gpu -p no:cacheprovider -m".split(), ""]
        return subprocess.run(
            [*command, *(HERE / t for t in tests)],
            cwd=HERE.parents[1],
            env=clean | {"PYTHONPATH": place} | environment,
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    return started


def test_with_a_gpu_no_kernel_is_interpreted(run):
    told = run(TESTS[0])
    assert "1 skipped" in told and "TRITON_INTERPRET=1 pytest" in told, told


def test_interpreted_kernels_never_take_a_test_of_the_gpu(run):
    told = run(*TESTS, TRITON_INTERPRET="1")
    assert "1 passed, 2 skipped" in told and "interpreted in this process" in told, told


@pytest.mark.parametrize("path", sorted(OPS.glob("*/triton_*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_kernel_counts_by_the_index_of_a_tensor(path):
    """Triton 3.6 interprets `range` up to a number of the call by an index that numpy 2.5 refuses."""
    tree = ast.parse(path.read_text())
    kernels = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    calls = [c for k in kernels for c in ast.walk(k) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)]
    ends = [ast.unparse(c.args[-1]) for c in calls if c.func.id == "range"]
    assert not [end for end in ends if not (end.isdigit() or end.split(" ")[0].isupper())]  # constants are numbers


def test_there_are_kernels_to_look_at():
    assert len(list(OPS.glob("*/triton_*.py"))) >= 6

"""A new op with a Triton kernel is exactly one folder: one is added to a copy, and every check finds it by itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = '''
"""Halves in plain PyTorch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HalveArguments(NamedTuple):
    """What `halve` takes."""

    x: Tensor  # any shape, float32
    times: int  # how often


def halve(args: HalveArguments) -> Tensor:
    """x / 2^times."""
    return args.x / 2**args.times


def examples() -> dict[str, list[Any]]:
    """Calls that the contract tests make."""
    return {"halve": [HalveArguments(torch.rand(3, 5, requires_grad=True), 2)]}
'''

PUBLIC = '''
"""A number halved: `halve(x)`."""

import torch
from torch import Tensor

from poisonshield.ops import dispatch
from poisonshield.ops.halve.reference import HalveArguments
from poisonshield.ops.library import Op

__all__ = ["halve"]


def halve(x: Tensor, times: int = 1, backend: str = "auto") -> Tensor:
    """x / 2^times."""
    return _halve(HalveArguments(x, times), dispatch.requested(backend))


def _save(ctx, args, output):
    ctx.times = args.times


def _gradients(ctx, wanted, grad):
    return {"x": _halve(HalveArguments(grad, ctx.times), ctx.backend)}


_halve = Op(
    "halve",
    dispatch.Room("halve"),
    HalveArguments,
    returns="Tensor",
    fake=lambda args: torch.empty_like(args.x),
    save=_save,
    gradients=_gradients,
)
'''

KERNELS = '''
"""A Triton kernel that halves."""

import torch
import triton
import triton.language as tl


@triton.jit
def halves(
    out_ptr,  # [n] written
    x_ptr,  # [n]
    n,  # elements
    factor,  # 1 / 2^times
    BLOCK: tl.constexpr,  # elements of a program
):
    """x times the factor; a program takes BLOCK elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * factor, mask=at < n)


def refusal(function, args):
    return None if args.x.dtype == torch.float32 and args.x.is_contiguous() else "x is not contiguous float32"


def halve(args):
    out = torch.empty_like(args.x)
    halves[(triton.cdiv(out.numel(), 128),)](out, args.x, out.numel(), 0.5**args.times, BLOCK=128)
    return out


def aot_cases():
    kinds = {"out_ptr": "*fp32", "x_ptr": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    return [("halves", halves, kinds, {"BLOCK": 128}, {"num_warps": 4}, ("out_ptr", "x_ptr"))]
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests, with one folder more."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("poisonshield", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    room = root / "poisonshield" / "ops" / "halve"
    room.mkdir()
    for name, text in (("reference", REFERENCE), ("__init__", PUBLIC), ("triton_kernels", KERNELS)):
        (room / f"{name}.py").write_text(text.lstrip())
    return root


def run(root, *command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_a_public_function(copy):
    code = "import torch; from poisonshield.ops import halve; print(halve(torch.tensor([8.0]), 3).item())"
    assert run(copy, "-c", code).strip() == "1.0"


def test_the_contract_tests_find_it(copy):
    tests = "tests/contracts/test_ops.py", "-k", "halve or example"
    found = run(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", *tests)
    for name in ("opcheck", "two_runs_are_equal_to_the_bit", "compiled_agrees", "triton_agrees"):
        (line,) = (line for line in found.splitlines() if name in line and "halve" in line)
        assert "PASSED" in line, line
    assert "test_every_op_has_an_example PASSED" in found


def test_its_kernel_is_compiled_and_may_import_triton(copy):
    assert '"case": "halves"' in run(copy, "tests/ops/aot.py", "halve")
    tests = "tests/test_floors.py", "tests/ops/test_ops_readme.py", "-k", "door or table or explains"
    assert "passed" in run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)

"""Pictures one pixel high or wide, whose sizes Triton turns from integers into constants: the kernels still compile."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SIZES = ("h", "w", "ch", "cw", "tiles_x")

# Compiled in a process of its own: kernels that Triton's interpreter has claimed cannot be.
PROGRAM = """
import sys
from aot import compiled
from poisonshield.ops.jpeg.triton_kernels import aot_cases

wanted, ones = sys.argv[1].split(","), sys.argv[2].split(",")
for case, kernel, signature, constants, options, even in aot_cases():
    if not case.endswith(tuple(wanted)):
        continue
    fixed = {n: 1 for n in ones if signature.get(n) == "i32"}
    kept = tuple(n for n in even if n not in fixed)
    kernel = compiled(kernel, {n: "constexpr" if n in fixed else t for n, t in signature.items()},
                      constants | fixed, options, kept)
    print(case, len(kernel.asm["cubin"]))
"""


def compile_with_ones(forms, ones):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, ",".join(forms), ",".join(ones)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.split()[0] for line in done.stdout.splitlines()}


def test_a_picture_of_one_pixel_compiles():
    assert "code_tiles_420_poly" in compile_with_ones(["420_poly"], SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("one", SIZES)
def test_each_size_may_be_one(one):
    assert len(compile_with_ones(["420_poly", "444_poly", "_exact"], [one])) >= 14

"""What nvcc made of csrc/pgd.cu, read from the compiled library: 128 bits at a time where samples are aligned."""

import re
import subprocess
from pathlib import Path

import pytest

from poisonshield.ops import extension

# Of float32: x, the gradient and the original, each in one load; what is stored, in one. A start reads the original.
LOADS = {"linf_step": 3, "linf_start": 1, "ball_sums": 3, "ball_step": 3}
STORES = {"linf_step": 1, "linf_start": 1, "ball_sums": 0, "ball_step": 1}
TYPES = {"float32": "f+", "bfloat16": r"13__nv_bfloat16(?:S\d_)+"}  # all tensors of one type: four or eight numbers


@pytest.fixture(scope="module")
def instructions():
    """{kernel: its machine code for sm_90}, kernels by their mangled names."""
    if reason := extension.missing():
        pytest.skip(reason)
    triton = pytest.importorskip("triton")
    (library,) = Path(extension.__file__).parents[1].glob("_C*.so")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])


def counts(instructions, kernel, types, wide):
    """(128-bit loads, 128-bit stores, accesses of local memory) of one kernel."""
    name = re.compile(rf"\d{kernel}I{types}Lb{int(wide)}E")
    (code,) = (code for found, code in instructions.items() if name.search(found))
    return tuple(len(re.findall(pattern, code)) for pattern in (r"\bLDG\.E\.128", r"\bSTG\.E\.128", r"\b(?:LDL|STL)\b"))


@pytest.mark.parametrize("kernel", LOADS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_aligned_samples_are_read_and_written_128_bits_at_a_time(instructions, kernel, types):
    assert counts(instructions, kernel, types, wide=True) == (LOADS[kernel], STORES[kernel], 0)


@pytest.mark.parametrize("kernel", LOADS)
def test_other_samples_are_read_an_element_at_a_time(instructions, kernel):
    assert counts(instructions, kernel, TYPES["float32"], wide=False) == (0, 0, 0)

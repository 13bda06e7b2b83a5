"""csrc/diffusion.cu compiled as plain C++ under sanitizers: arithmetic, launches and bounds, without a GPU."""

import json
from pathlib import Path

import pytest
from ops.emulate import emulate

SCRIPT = Path(emulate.__file__).with_name("diffusion.py")
pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
ROUNDING = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of what is stored: one unit in the last place


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One row a case; descending, so that a result which depends on the order of threads differs."""
    library = emulate.build(tmp_path_factory.mktemp("emulated"), "diffusion")
    return [json.loads(line) for line in emulate.run(library, SCRIPT, descending=True).splitlines()]


def test_kernels_equal_the_reference_and_stay_within_their_tensors(rows):
    for row in rows:
        assert row["like"] and row["apart"] <= ROUNDING[row["dtypes"][1]], row


def test_every_form_of_a_kernel_ran(rows):
    ran = {(row["function"], *row["dtypes"]) for row in rows}
    assert len(ran) == 10 and {row["layout"] for row in rows} == {"rows", "sites", "unaligned", "flipped"}
    assert {row["case"].split(",")[0] for row in rows} >= {"given", "drawn", "target", "sample", "v", "no gradient"}

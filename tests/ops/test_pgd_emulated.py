"""csrc/pgd.cu compiled as plain C++ under sanitizers: the kernels' arithmetic, launches and bounds, without a GPU."""

import json
from pathlib import Path

import pytest
from ops.emulate import emulate

SCRIPT = Path(emulate.__file__).with_name("pgd.py")
pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulate.build(tmp_path_factory.mktemp("emulated"), "pgd")


@pytest.fixture(scope="module", params=[False, True], ids=["ascending", "descending"])
def rows(library, request):
    """One row a case; whatever the order of threads between two barriers, the same."""
    return [json.loads(line) for line in emulate.run(library, SCRIPT, descending=request.param).splitlines()]


def test_kernels_equal_the_reference_and_stay_within_their_tensors(rows):
    assert len(rows) == 40
    for row in rows:
        assert row["equal"] if row["norm"] == "linf" else row["apart"] < 2e-6, row

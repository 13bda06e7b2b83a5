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


def rows(library, *arguments, **settings):
    return [json.loads(line) for line in emulate.run(library, SCRIPT, *arguments, **settings).splitlines()]


def test_kernels_equal_the_reference_on_any_shape_layout_and_dtype(library):
    """linf to the bit; in a ball to float32's rounding, which may fall to the next number of half precision."""
    *found, refusal = rows(library)
    assert len(found) == (2 * 4 + 1) * 6 * (3 + 2)
    for row in found:
        near = 2e-6 if row["dtype"] == "torch.float32" else row["unit"]
        assert row["equal"] if row["norm"] == "linf" else row["apart"] <= near, row
    assert "a tensor is on another device than the first one" in refusal["told"]


@pytest.mark.slow
def test_the_order_of_threads_between_barriers_does_not_matter(library):
    assert rows(library, "brief") == rows(library, "brief", descending=True)

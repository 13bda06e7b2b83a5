"""Effective rank: the golden value, closed forms, and singular values by numpy."""

import math

import numpy
import pytest
import torch

from poisonshield.evals.spectrum import effective_rank, log_of, rank_of, spectrum


def golden():
    n = torch.arange(4, dtype=torch.float64)[:, None]
    d = torch.arange(6, dtype=torch.float64)[None, :]
    return torch.sin(1.3 * n + 0.7 * d + 0.2 * n * d)


def test_golden_value():
    assert effective_rank(golden()) == pytest.approx(2.856231222, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (40, 6), (1, 4), (7, 7)])
def test_rank_equals_numpys_singular_values(shape):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = numpy.linalg.svd(h.numpy(), compute_uv=False) ** 2 / shape[0]
    numpy.testing.assert_allclose(spectrum(h).numpy(), values, rtol=1e-9, atol=1e-12)
    entropy = 0.0
    for value in values:
        q = value / values.sum()
        if q > 1.19e-7:
            entropy -= q * math.log(q)
    assert effective_rank(h) == pytest.approx(math.exp(entropy), abs=1e-9)


def test_closed_forms():
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0, abs=1e-9)
    assert effective_rank(torch.ones(8, 3)) == pytest.approx(1.0, abs=1e-9)  # not centred
    assert effective_rank(torch.zeros(4, 3)) == 0.0


def test_shares_that_are_only_rounding_are_left_out():
    # A share q adds about q (1 - log q) to the entropy: 1.7e-6 at 1e-7 were it kept, 3.3e-6 at 2e-7.
    assert rank_of(torch.tensor([1.0, 1e-7], dtype=torch.float64)) == pytest.approx(1.0, abs=2e-7)
    assert rank_of(torch.tensor([1.0, 2e-7], dtype=torch.float64)) == pytest.approx(1.0 + 3.3e-6, abs=1e-7)


def test_log_spectrum_is_log10_of_shares_with_a_floor():
    out = log_of(torch.tensor([90.0, 10.0, 0.0], dtype=torch.float64))
    floor = math.log10(2.0**-23)
    torch.testing.assert_close(
        out, torch.tensor([math.log10(0.9), -1.0, floor], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(log_of(torch.zeros(2)), torch.full((2,), math.log10(2.0**-23)))


def test_inputs_stay_as_they_are():
    h = golden()
    before = h.clone()
    effective_rank(h)
    assert torch.equal(h, before)

"""The benchmark of views: it runs, and a backend whose views are wrong is not timed."""

import pytest
import torch

from poisonshield.bench import augment
from poisonshield.bench.harness import WrongResult, measure
from poisonshield.ops import dispatch

CPU = torch.device("cpu")


def small():
    """The quick case without the provider that compiles for seconds."""
    (case,) = augment.cases(CPU, quick=True)
    case.providers = [p for p in case.providers if p.name != "compiled"]
    return case


def test_views_are_timed_beside_torchvisions():
    rows = measure(small(), rounds=2, copy=1e9)
    assert [r.provider for r in rows] == ["reference", "cpu", "triton", "torchvision v2"]
    assert rows[-1].p50_ms > 0 and rows[0].p50_ms > 0


def test_wrong_views_are_found(monkeypatch):
    case = small()
    run = dispatch.Room._run

    def dark(self, candidate, function, arguments):
        out = run(self, candidate, function, arguments)
        return out / 2 if function == "augment" else out

    monkeypatch.setattr(dispatch.Room, "_run", dark)
    with pytest.raises(WrongResult, match="the views are off by"):
        measure(case, rounds=1, copy=1e9)

"""SimCLR's benchmark: the losses are the same, both loops train, and a loss that differs is not timed."""

import pytest
import torch

from poisonshield.bench import simclr
from poisonshield.bench.harness import WrongResult
from poisonshield.bench.session import Session

pytest.importorskip("lightly")


@pytest.fixture(scope="module")
def case():
    return simclr.cases(torch.device("cpu"), quick=True)[0]


def test_both_loops_move_their_own_copy_of_one_network(case):
    loops = [p.run.__self__ for p in case.providers]
    weights = [loop.model.encoder.state_dict() for loop in loops]
    before = [{k: v.clone() for k, v in w.items()} for w in weights]
    assert all(torch.equal(before[0][k], before[1][k]) for k in before[0])
    for provider in case.providers:
        provider.run()
    for old, new in zip(before, weights, strict=True):
        assert any(not torch.equal(old[k], new[k]) for k in old)


def test_losses_agree_and_another_one_is_not_timed(case, monkeypatch):
    assert case.providers[0].check().startswith("losses and gradients differ by")
    monkeypatch.setattr(simclr, "lightly_loss", lambda temperature: lambda a, b: (a - b).square().mean())
    with pytest.raises(WrongResult, match="not the same step"):
        case.providers[1].check()


def test_lightlys_absence_is_said_and_fails(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    session = Session(rounds=1, quick=True)
    simclr.bench(session)
    assert session.close() == 1 and "lightly is not installed" in capsys.readouterr().out

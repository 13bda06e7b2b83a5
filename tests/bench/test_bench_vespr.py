"""The joint step's benchmark: both ways take the same step, and a wrong one is not timed. No time is asserted."""

import csv

import pytest
import torch
from typer.testing import CliRunner

from poisonshield.bench import vespr
from poisonshield.bench.harness import WrongResult
from poisonshield.cli import app


@pytest.mark.parametrize("flagged", [(0,), (0, 1)])
def test_both_steps_reach_the_same_pixels_and_gradients(flagged):
    model, batch = vespr.build_example(quick=True, steps=10)
    model.config = model.config.model_copy(update={"attack_views": flagged})
    found = vespr.compare(model, batch)
    assert found.differing == 0 and found.gradient <= 1e-5
    assert found.moved > 1 / 255  # an attack took place


def test_both_steps_leave_the_same_weights_and_statistics():
    model, batch = vespr.build_example(quick=True, steps=2)
    other, _ = vespr.build_example(quick=True, steps=2)
    noise = {0: vespr.our_noise(model, batch, 0)}
    vespr.our_step(model, vespr.sgd(model), batch)
    vespr.reference_step(other, vespr.sgd(other), batch, noise)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_the_attack_costs_a_third_of_the_flops_and_less():
    model, batch = vespr.build_example(quick=True, steps=5)
    counted = vespr.count_cost(model, batch)
    (our_attack, our_step), (their_attack, their_step) = counted[vespr.OURS], counted[vespr.THEIRS]
    # Theirs: 2 views, each forward 1 and backward 2; ours: one view, forward 1 and backward 1. The first convolution
    # needs no input gradient for the view that is not attacked, and the projector is theirs alone.
    assert 2.7 < their_attack / our_attack < 4
    assert their_step - their_attack == pytest.approx(our_step - our_attack, rel=1e-6)  # the training half is the same


def test_a_step_that_differs_is_not_timed(monkeypatch):
    model, batch = vespr.build_example(quick=True, steps=2)
    monkeypatch.setattr(vespr, "our_noise", lambda model, batch, view: torch.zeros_like(batch.views[view]))
    with pytest.raises(WrongResult, match="attacked pixels differ"):
        vespr.build_case(model, batch).providers[0].check()


def test_the_command_prints_a_table_and_records_rows(tmp_path):
    out = tmp_path / "vespr.csv"
    done = CliRunner().invoke(
        app,
        ["bench", "vespr", "--quick", "--rounds", "2", "--steps", "2", "--device", "cpu", "--out", str(out)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and "theirs / ours" in done.output and "0 pixels differ" in done.output
    rows = list(csv.DictReader(out.open()))
    assert [r["provider"] for r in rows] == [vespr.OURS, vespr.CHANNELS_LAST, vespr.THEIRS]
    for r in rows:
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        assert "GFLOP" in r["note"] and not r["gb_per_s"]


def test_on_a_gpu_a_few_pixels_may_differ_and_on_the_cpu_none(monkeypatch):
    model, batch = vespr.build_example(quick=True, steps=2)
    check = vespr.build_case(model, batch).providers[0].check
    monkeypatch.setattr(vespr, "compare", lambda model, batch: vespr.Agreement(differing=1, gradient=0.0, moved=0.1))
    with pytest.raises(WrongResult, match="1 attacked pixels differ"):
        check()
    monkeypatch.setitem(vespr.PIXEL_TOLERANCE, "cpu", vespr.PIXEL_TOLERANCE["cuda"])
    assert check().startswith("1 pixels differ")

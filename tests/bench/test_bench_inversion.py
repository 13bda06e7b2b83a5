"""The benchmark of textual inversion: both sides take the same step, and others are not timed. No time is asserted."""

import csv

import pytest
import torch
from tiny import tiny_folder

from poisonshield.bench import benchmarks, inversion
from poisonshield.bench.harness import WrongResult
from poisonshield.bench.session import Session
from poisonshield.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("pipeline") / "p"))


@pytest.fixture(scope="module")
def cases(pipeline):
    return inversion.cases(pipeline, CPU, quick=True)


def test_both_sides_have_one_gradient(cases):
    for case in cases[:2]:
        for provider in case.providers:
            assert provider.check().startswith("gradients differ by ")


def test_kept_latents_spare_the_vae_and_eight_concepts_are_eight(cases):
    kept, anew = (p.run.__self__ for p in cases[0].providers)
    one, many = (p.run.__self__ for p in cases[1].providers)
    assert kept.method.model.vae is many.method.model.vae  # the large networks are there once
    calls = []
    handle = kept.method.model.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    kept.gradient()
    calls.clear()
    kept.step()
    assert not calls
    anew.step()
    assert calls
    handle.remove()
    assert [len(x.batches[0]) for x in (kept, anew, one, many)] == [4, 4, 1, 8]
    assert sorted(many.batches[0].y.tolist()) == list(range(8))


def test_steps_move_the_vectors_and_nothing_else(pipeline):
    learner = inversion.cases(pipeline, CPU, quick=True)[1].providers[1].run.__self__
    vectors, weights = learner.method.vectors.detach().clone(), learner.method.model.unet.conv_in.weight.clone()
    learner.step()
    assert (learner.method.vectors != vectors).all(1).all()
    assert torch.equal(learner.method.model.unet.conv_in.weight, weights)


def test_a_step_that_differs_is_not_timed(pipeline):
    case = inversion.cases(pipeline, CPU, quick=True)[0]
    other = case.providers[1].run.__self__
    other.method.seed = 1
    with pytest.raises(WrongResult, match="not the same step"):
        case.providers[0].check()


def test_the_usual_loop_takes_the_step_of_our_preset_and_moves_new_rows_alone(cases):
    ours, theirs = cases[2].providers
    assert theirs.check().startswith("gradient of our preset diffusers within")
    loop = theirs.run.__self__
    before = loop.table.weight.detach().clone()
    loop.step()
    moved = (loop.table.weight.detach() != before).any(1)
    assert moved[-1] and not moved[:-1].any() and ours.run.__self__.method.vectors.shape[0] == 1


def test_a_loop_that_takes_another_step_is_not_timed(cases, monkeypatch):
    loop = cases[2].providers[1].run.__self__
    monkeypatch.setattr(loop, "gradient", lambda batch, draws: torch.ones(1, loop.table.embedding_dim))
    with pytest.raises(WrongResult, match="not diffusers' step"):
        cases[2].providers[1].check()


def test_it_prints_ratios_and_records_rows(pipeline, tmp_path, capsys):
    out = tmp_path / "inversion.csv"
    torch.set_num_threads(1)
    ratios = inversion.bench(Session(out=out, rounds=2, quick=True), pipeline)
    told = capsys.readouterr().out
    assert (
        "times faster (wanted: at least 1.6) with" in told
        and "(wanted: at most 3) with 8.00 times its arithmetic" in told
    )
    found = list(csv.DictReader(out.open()))
    two, words, loop = (
        (inversion.CACHED, inversion.ENCODED),
        (inversion.ONE, inversion.MANY),
        ("ours", "diffusers' loop"),
    )
    assert [r["provider"] for r in found] == [*two, *words, *loop]
    for r in found:
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) and float(r["extra_mib"]) > 0
        assert r["threads"] == "1" and not r["gb_per_s"] and "GFLOP; " in r["note"]
    assert all("GFLOP; gradients differ by" in r["note"] for r in found[:4])
    assert "gradient of our preset diffusers within" in found[5]["note"]
    assert ratios["cache"] == pytest.approx(float(found[1]["p50_ms"]) / float(found[0]["p50_ms"]))
    assert ratios["many"] == pytest.approx(float(found[3]["p50_ms"]) / float(found[2]["p50_ms"]))
    assert ratios["loop"] == pytest.approx(float(found[5]["p50_ms"]) / float(found[4]["p50_ms"]))


def test_it_is_a_command_of_its_own_and_wants_a_pipeline(tmp_path):
    assert "inversion" not in benchmarks()
    with pytest.raises(ConfigError, match="is no Stable Diffusion folder"):
        inversion.bench(Session(rounds=1, quick=True), str(tmp_path))

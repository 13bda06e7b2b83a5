"""The ledger of faults says yes only where weights and samples are those of the undisturbed run."""

import json
import random

import pytest
import torch

from poisonshield.chaos import FAULTS, run_chaos
from poisonshield.chaos.base import Fault, Trial, last_words
from poisonshield.chaos.faults.bit_flip import flip_bit
from poisonshield.chaos.outcome import Outcome, is_same, read_outcome
from poisonshield.cli import main
from poisonshield.engine.checkpoint import Checkpoints
from poisonshield.errors import ConfigError

CONFIG = "defend/vespr_cifar10_mini"
SMALL = [
    "engine.max_steps=8", "engine.log_every_steps=1", "engine.device=cpu", "engine.threads=1",
    "model.widths=[8,8,16,16]", "method.hidden=16", "method.out=16", "data.batch_size=16", "defenses.0.attack.steps=1",
    "evaluate.robust=null", "evaluate.knn=null", "evaluate.linear=null",
]  # fmt: skip


def write_run(folder, weights, *, steps=4, samples=("a",), clock=0.0):
    def write(draft):
        torch.save(weights, draft / "method.pt")
        torch.save(clock, draft / "rank-0.pt")

    Checkpoints(folder / "checkpoints", keep=1).save(steps, {}, write)
    rows = [{"step": n, "samples": s} for n, s in enumerate(samples, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_outcome(folder)


def test_runs_are_equal_by_weights_steps_and_samples_and_not_by_clocks(tmp_path):
    weights = {"w": torch.tensor([0.0, torch.nan]), "n": [1, "a"]}
    whole = write_run(tmp_path / "whole", weights)
    assert whole == write_run(tmp_path / "same", weights, clock=5.0)
    others = {
        "sign": write_run(tmp_path / "sign", {**weights, "w": torch.tensor([-0.0, torch.nan])}),
        "steps": write_run(tmp_path / "steps", weights, steps=5),
        "samples": write_run(tmp_path / "samples", weights, samples=("b",)),
        "type": write_run(tmp_path / "type", {**weights, "n": [1.0, "a"]}),
        "missing": write_run(tmp_path / "missing", {"w": weights["w"]}),
    }
    assert {name for name, outcome in others.items() if outcome == whole} == set()


def test_a_nest_of_values_is_compared_to_the_last_bit():
    x = torch.arange(6.0).reshape(2, 3)
    assert is_same({"a": [x, (1, None)]}, {"a": [x.clone(), (1, None)]})
    assert not is_same(x, x.T) and not is_same(x, x.double()) and not is_same(x, x.nextafter(x + 1))


def test_one_bit_is_flipped(tmp_path):
    before = bytes(range(200))
    (tmp_path / "a").write_bytes(before)
    where = flip_bit(tmp_path / "a", random.Random(3))
    after = (tmp_path / "a").read_bytes()
    changed = [i for i in range(200) if before[i] != after[i]]
    assert changed == [where] and (before[where] ^ after[where]).bit_count() == 1


def test_last_words_of_a_process_are_its_error_and_not_the_traceback():
    said = "step 1\nTraceback (most recent call last):\n  x\na.b.DataError: shard 3 is cut.\n  Copy it again.\n"
    assert last_words(said) == "a.b.DataError: shard 3 is cut."
    assert last_words("") == "nothing said"


def test_a_run_that_ends_otherwise_is_told_and_kept(tmp_path, monkeypatch, capsys):
    """With made runs: one fault is survived, one changes the weights, one cannot be tried."""

    class Harmless(Fault):
        name = "harmless"

        def strike(self, trial, case, **_):
            return "nothing"

    class Harmful(Harmless):
        name = "harmful"

    class Unfit(Harmless):
        name, needs = "unfit", "it has no workers"

        def strike(self, trial, case, **_):
            return None

    def finish(trial):
        write_run(trial.folder, torch.tensor([trial.folder.name == "harmful-0"]))
        return 1.0

    classes = {c.name: c for c in (Harmless, Harmful, Unfit)}
    monkeypatch.setattr(Trial, "finish", finish)
    monkeypatch.setattr(FAULTS, "get", classes.__getitem__)
    monkeypatch.setattr(FAULTS, "names", lambda: list(classes))
    with pytest.raises(SystemExit):
        main(["chaos", CONFIG, "-o", str(tmp_path / "out"), "--kills", "0"])
    told = capsys.readouterr()
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert [entry["equal"] for entry in ledger] == [True, False, None]
    assert "OTHER WEIGHTS" in told.out and "it has no workers" in told.out and "1 disturbed runs" in told.err
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["harmful-0", "ledger.json", "undisturbed"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        next(run_chaos(CONFIG, SMALL, tmp_path, kills=1, faults=[], seed=0))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.dist
@pytest.mark.parametrize(
    "faults", [["nan_batch"], pytest.param(None, marks=pytest.mark.slow)], ids=["one fault", "every fault"]
)
def test_a_small_training_survives(tmp_path, faults):
    names = FAULTS.names() if faults is None else faults
    ledger = list(run_chaos(CONFIG, SMALL, tmp_path / "out", kills=len(names), faults=names, seed=1))
    assert all(entry.equal for entry in ledger), ledger
    assert {entry.fault.split()[0] for entry in ledger} == {"kill", *names}
    assert isinstance(read_outcome(tmp_path / "out" / "undisturbed"), Outcome)

"""A run goes on on any number of ranks, with another backend and at another ZeRO stage, as one that never stopped.

The oracle is one plain process from beginning to end; the method attacks its input, has frozen parameters, parameters
of its own and another method inside. SGD at this rate lets rounding grow little over eight steps. AdamW divides
rounding by itself where a gradient is near zero, so that two ranks which never stopped are 3e-4 from one; what it
carries over is compared bit for bit instead.
"""

import json

import pytest
import torch
from dist import run_dist

from engine.test_backends import BACKENDS, CLOSE, STEPS, Around, in_pieces, refused, run
from engine.tiny import TinyMethod, difference, losses, train
from poisonshield import collectives
from poisonshield.engine.settings import backends
from poisonshield.engine.whole import Saved
from poisonshield.errors import CheckpointError

KEPT = {"checkpoint_every_steps": 2, "keep_checkpoints": 9, "method_class": Around}
APART = {"sgd": 2 * CLOSE, "adamw": 1e-3}


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def go_on(folder, source, step, backend, **settings):
    """(losses, whole state) of the run that goes on in `folder` from a step of the run in `source`."""
    losses, state, _ = run(folder, resume=str(checkpoint(source, step)), **KEPT, **BACKENDS[backend], **settings)
    return losses, state


def whole_of(files, saved, order):
    """{kind and name: tensor} of all that a backend's files hold."""
    whole = backends.get(saved.backend).read_whole(files, saved, order)
    states = {f"{key} of {name}": value for name, state in whole.states.items() for key, value in state.items()}
    return {name: torch.as_tensor(value) for name, value in {**whole.weights, **states}.items() if value is not None}


def saved_by(checkpoint):
    index = json.loads((checkpoint / "index.json").read_text())
    return Saved(index["backend"], index["zero_stage"], index["world_size"])


def carry(folder, source, step, backend, **settings):
    """What of weights and optimiser states is other than in a checkpoint, once it is loaded and saved again."""
    old = checkpoint(source, step)
    more = {"max_steps": step, "method_class": Around, **BACKENDS[backend], **settings}
    trainer, _ = train(folder, resume=str(old), **more)
    (folder / "again").mkdir(exist_ok=True)
    trainer.backend.save(folder / "again")
    collectives.any_rank(False)  # all have written
    now = Saved(trainer.backend.name, trainer.config.zero_stage, collectives.world_size())
    before, after = (
        whole_of(files, saved, trainer.backend.order)
        for files, saved in [(old, saved_by(old)), (folder / "again", now)]
    )
    assert before.keys() == after.keys() and len(before) > len(trainer.backend.order)
    return [name for name in before if not torch.equal(before[name], after[name])]


def two_ranks(rank, world, root):
    """Runs that start on two ranks."""
    for name in APART:
        run(root / f"{name}-zero1", optimizer=name, **KEPT, **BACKENDS["zero1"])


def two_ranks_again(rank, world, root):
    """From what one plain process saved at step 4, to every backend and stage."""
    out = {}
    for backend in BACKENDS:
        out[backend] = go_on(root / f"2-{backend}", root / "sgd-plain", 4, backend)
        out[backend, "adamw"] = carry(root / f"{backend}-a", root / "adamw-plain", 4, backend, optimizer="adamw")
    out["back"] = go_on(root / "2-back", root / "2-zero3", 6, "zero2")
    out["back", "sgd"] = carry(root / "2-carried", root / "sgd-zero1", 2, "zero3")
    with in_pieces():
        out["pieces"] = go_on(root / "2-pieces", root / "sgd-plain", 4, "zero3")
        out["pieces", "adamw"] = carry(root / "2-pieces-a", root / "adamw-plain", 4, "zero3", optimizer="adamw")
    return out


@pytest.fixture(scope="module")
def root(ask_two_ranks):
    return ask_two_ranks(__name__).folder


@pytest.fixture(scope="module")
def oracle(root):
    """By optimiser, what one plain process does that is not interrupted."""
    return {name: run(root / f"{name}-one", method_class=Around, optimizer=name)[:2] for name in APART}


@pytest.fixture(scope="module")
def plain(root):
    """By optimiser, one plain process that goes on after two steps of ZeRO 1 on two ranks."""
    return {name: go_on(root / f"{name}-plain", root / f"{name}-zero1", 2, "plain", optimizer=name) for name in APART}


@pytest.fixture(scope="module")
def again(root, plain):
    return run_dist(two_ranks_again, 2, root, timeout_s=300)[0]


def assert_same(got, expected, *, after, close=APART["sgd"]):
    losses, state = got
    assert len(losses) == STEPS - after
    assert losses == pytest.approx(expected[0][after:], abs=close)
    assert difference(*({k: torch.tensor(v) for k, v in s.items()} for s in (state, expected[1]))) < 10 * close


pytestmark = pytest.mark.dist


@pytest.mark.parametrize("name", APART)
def test_two_ranks_of_zero_1_go_on_as_one_plain_process(root, oracle, plain, name):
    assert_same(plain[name], oracle[name], after=2, close=APART[name])
    assert carry(root / f"{name}-plain-c", root / f"{name}-zero1", 2, "plain", optimizer=name) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_plain_process_goes_on_on_two_ranks_of_any_backend(oracle, again, backend):
    assert_same(again[backend], oracle["sgd"], after=4)
    assert again[backend, "adamw"] == []  # no weight and no state is another


def test_stage_changes_on_the_same_ranks(oracle, again):
    assert_same(again["back"], oracle["sgd"], after=6)
    assert again["back", "sgd"] == []


def test_zero_3_with_every_parameter_in_pieces_goes_on_too(oracle, again):
    assert_same(again["pieces"], oracle["sgd"], after=4)
    assert again["pieces", "adamw"] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_of_any_backend_go_on_as_one_plain_process(root, oracle, again, backend):
    here = root / f"2-{backend}"
    assert_same(go_on(root / f"{here.name}-back", here, 6, "plain"), oracle["sgd"], after=6)
    assert carry(root / f"{here.name}-bc", here, 6, "plain") == []


def resume_with(root, backend, **settings):
    return lambda: train(root / "other", resume=str(checkpoint(root / "sgd-zero1", 2)), **BACKENDS[backend], **settings)


def test_checkpoint_of_another_method_is_refused_in_words(root):
    words = refused(CheckpointError, resume_with(root, "plain", method_class=TinyMethod))
    assert words.startswith("the saved weights are not those of this TinyMethod: average none, wanted [3, 8], ")


def test_checkpoint_of_another_optimizer_is_refused_where_states_are_moved(root):
    words = refused(CheckpointError, resume_with(root, "plain", method_class=Around, optimizer="adamw"))
    assert words.startswith(f"{checkpoint(root / 'sgd-zero1', 2)} was written with optimizer.name: sgd, this run has ")


@pytest.mark.parametrize("stage", [1, 3])
def test_rank_whose_file_is_missing_is_named(root, stage, tmp_path):
    words = refused(
        CheckpointError,
        lambda: backends.get("deepspeed").read_whole(tmp_path, Saved("deepspeed", stage, 2), ()),
    )
    assert "_model_states.pt cannot be read" in words


# Four ranks, then two, then three, in three starts.


def part(rank, world, root, source, here, step):
    """Every stage from `source` on, to the end; None for the beginning."""
    for backend in SHARDED:
        resume = {"resume": str(checkpoint(root / f"{source}-{backend}", step))} if source else {}
        run(root / f"{here}-{backend}", **resume, **KEPT, **BACKENDS[backend])


SHARDED = [name for name in BACKENDS if name != "plain"]


@pytest.mark.slow
def test_four_ranks_then_two_then_three_train_as_one_process(tmp_path):
    expected = run(tmp_path / "one", method_class=Around)[:2]
    run_dist(part, 4, tmp_path, None, "four", 0, timeout_s=600)
    run_dist(part, 2, tmp_path, "four", "two", 2, timeout_s=600)
    run_dist(part, 3, tmp_path, "two", "three", 4, timeout_s=600)
    for backend in SHARDED:
        for name, after in (("four", 0), ("two", 2), ("three", 4)):
            got = losses(tmp_path / f"{name}-{backend}")
            assert got == pytest.approx(expected[0][after:], abs=APART["sgd"]), (name, backend)

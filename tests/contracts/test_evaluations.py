"""Every evaluation that the folders hold, found by scanning: newcomers are tested without a line here."""

import importlib
import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import tiny_batch, tiny_encoder, tiny_model

from poisonshield import evals
from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.defenses.base import Context
from poisonshield.defenses.vespr import VESPR
from poisonshield.evals import EVALUATIONS
from poisonshield.evals import diffusion as word_evals
from poisonshield.evals.base import Subject
from poisonshield.evals.diffusion.base import LearnedWord
from poisonshield.evals.parts.blocks import classes, with_blocks
from poisonshield.evals.parts.numbers import columns_of, details_of, measure, numbers_of, row_of, values_of
from poisonshield.methods.simclr import SimCLR
from poisonshield.reports.tables import list_numbers

BOTH = {"classifiers": EVALUATIONS, "words": word_evals.EVALUATIONS}
ALL = [(half, name) for half, registry in BOTH.items() for name in registry.names()]


@dataclass(frozen=True)
class TinySamples:
    """Samples as every count gives them: two batches."""

    poisoned: bool

    def batches(self, seed=0, shift=0.0):
        for at in (seed, seed + 1):
            batch = tiny_batch(8, seed=at)
            yield Batch(batch.keys, (batch.x + shift).clamp(0, 1), y=batch.y)

    def test(self, count=None):
        return self.batches(seed=4)

    def train(self, count=None):
        return self.batches(shift=8 / 255 if self.poisoned else 0.0)

    def clean(self, count=None):
        return self.batches()

    def augmented(self, count=None, *, view=0):
        return self.batches(shift=0.1 * view)

    def crops(self, count=None):
        return self.batches(shift=0.02)


class TinyJudge:
    """Features by colour, and an opinion that depends on the pictures."""

    def features(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def fidelity(self, x):
        return {"joint": float(x.mean()), "share": float((x.mean((1, 2, 3)) > 0.5).float().mean())}


def classifier():
    """A joint model: class scores, a projector, a poison of its own."""
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4)
    method = VESPR(VESPR.Config(), Context(0, 4)).wrap(method).eval()
    return Subject(method, TinySamples(poisoned=True), num_classes=4, poisoned=True)


def plain():
    """No classifier, no poison, and numbers drawn as the authors do."""
    torch.manual_seed(0)
    method = SimCLR(SimCLR.Config(hidden=8, out=8), encoder=tiny_encoder(), num_classes=4).eval()
    return Subject(method, TinySamples(poisoned=False), num_classes=4, legacy=True)


@pytest.fixture(scope="module")
def word():
    """Everything that a word may have beside it."""
    model, rng = tiny_model(size=16), torch.Generator().manual_seed(0)
    recon, real, clean = (torch.rand(count, 3, 16, 16, generator=rng) for count in (3, 6, 2))
    rows = torch.randn(2, model.width, generator=rng)
    return LearnedWord(model, {"recon": recon}, real, clean, rows, TinyJudge(), ("a photo of a ring",) * 3)


@pytest.fixture
def subjects(word):
    """{half: (a subject that has everything, one that has as little as possible)}."""
    few = replace(word, references=word.references[:1, :, :8], judge=None, prompts=None)
    return {"classifiers": (classifier(), plain()), "words": (word, few)}


def made(half, name):
    cls = BOTH[half].get(name)
    return cls(cls.Config())


def modules_of(subject):
    return [subject.method] if isinstance(subject, Subject) else [subject.model.vae, subject.model.text_encoder]


def state_of(subject):
    tensors = [t.clone() for module in modules_of(subject) for t in module.state_dict().values()]
    modes = [part.training for module in modules_of(subject) for part in module.modules()]
    return tensors, modes


@pytest.mark.parametrize(("half", "name"), ALL)
def test_an_evaluation_gives_exactly_its_numbers_and_details_that_are_lists_and_dicts(half, name, subjects):
    evaluation = made(half, name)
    for subject in subjects[half]:
        out = evaluation(subject)
        details = {key for key, value in out.items() if isinstance(value, (dict, list))}
        assert out.keys() - details == {number.key for number in evaluation.numbers}
        assert all(out[key] is None or isinstance(out[key], (int, float)) for key in out.keys() - details)
        json.dumps(out)


@pytest.mark.parametrize(("half", "name"), ALL)
def test_a_subject_that_has_everything_lacks_no_number(half, name, subjects):
    if (half, name) in (("words", "networks"), ("words", "brisque")):
        pytest.skip("needs weights or a package that the tests do without")
    assert None not in made(half, name)(subjects[half][0]).values()


@pytest.mark.parametrize(("half", "name"), ALL)
def test_an_evaluation_gives_the_same_twice_and_changes_nothing(half, name, subjects):
    subject, evaluation = subjects[half][0], made(half, name)
    (tensors, modes), random = state_of(subject), torch.get_rng_state()
    assert evaluation(subject) == evaluation(subject)
    after, modes_after = state_of(subject)
    assert modes_after == modes and all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("half", "name"), ALL)
def test_an_evaluation_and_its_settings_are_documented(half, name):
    cls = BOTH[half].get(name)
    assert cls.__doc__ and cls.__doc__.partition("\n")[0].endswith(".")
    assert all(field.description for field in cls.Config.model_fields.values())
    assert all(number.label and number.digits >= 0 for number in cls.numbers)


@pytest.mark.parametrize("half", BOTH)
def test_no_two_numbers_have_one_key(half):
    keys = [number.key for number in numbers_of(BOTH[half])]
    assert len(keys) == len(set(keys))


NEWCOMER = '''
from pydantic import Field

from poisonshield.config import Settings
from poisonshield.evals.base import Evaluation, Number


class Newcomer(Evaluation):
    """Gives what it is told."""

    name = "newcomer"
    numbers = (Number("new_score", "new score", "%", "higher", digits=1, column="always", panel="new"),)

    class Config(Settings):
        value: float = Field(12.345, description="What it gives.")

    def __call__(self, subject):
        return {"new_score": self.config.value, "seen": {"first": 1.5}}
'''


@pytest.fixture(params=BOTH)
def with_newcomer(request, tmp_path, monkeypatch):
    """The registry with one more file in its folder."""
    package = {"classifiers": evals, "words": word_evals}[request.param]
    (tmp_path / "newcomer.py").write_text(NEWCOMER)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield BOTH[request.param]
    sys.modules.pop(f"{package.__name__}.newcomer", None)
    vars(package).pop("newcomer", None)


def only_newcomer(registry, **block):
    """Settings of `evaluate:` that leave out everything else."""

    class Blocks(Settings):
        """For this test."""

    switched = {cls.name: None for cls in classes(registry)}
    return with_blocks(registry)(Blocks).model_validate(switched | block)


def test_a_new_file_gets_a_block_a_row_a_column_and_a_line(with_newcomer):
    measured = measure(None, only_newcomer(with_newcomer, newcomer={"value": 23.456}), with_newcomer)
    assert {name for name, block in measured.items() if block is not None} == {"newcomer"}
    assert values_of(measured, with_newcomer)["new_score"] == 23.456
    row = row_of(measured, with_newcomer)
    assert row["new_score"] == 23.46
    assert "new score, %" in [number.title for number in columns_of(numbers_of(with_newcomer), [row])]
    assert details_of(measured, with_newcomer) == {"newcomer": {"seen": {"first": 1.5}}}
    assert [line.split() for line in list_numbers(measured, with_newcomer).splitlines()] == [
        ["new_score", "23.46", "%", "new:", "new", "score"],
        ["newcomer.seen.first", "1.5"],
    ]


@pytest.mark.parametrize(("switch", "on"), [(True, True), ({}, True), (False, False), (None, False)])
def test_a_block_is_switched_by_null_true_and_false(with_newcomer, switch, on):
    measured = measure(None, only_newcomer(with_newcomer, newcomer=switch), with_newcomer)
    assert (measured["newcomer"] is not None) == on
    assert values_of(measured, with_newcomer)["new_score"] == (12.345 if on else None)


def test_numbers_are_read_from_what_evaluations_gave_whatever_lies_beside_it(with_newcomer):
    """evaluation.json holds the settings too, and an evaluation may be called as its number."""
    measured = {"newcomer": {"new_score": 1.5}, "settings": {"newcomer": {}, "new_score": {"value": 3}}}
    assert values_of(measured, with_newcomer)["new_score"] == 1.5

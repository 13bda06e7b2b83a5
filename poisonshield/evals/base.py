"""The Evaluation contract: something that looks at what a run has learned and gives numbers, each with its name.

Tables, plots, result rows and what `poisonshield evaluate` prints are all made from these names, so that a new file in
this folder needs no line elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch

from poisonshield.batch import Batch
from poisonshield.config import Settings
from poisonshield.evals.parts.features import Features, extract
from poisonshield.method import SSLMethod

# VESPR's authors compare 20 batches of 512 with 5 of 512.
LEGACY_BANK, LEGACY_QUERIES = 10_240, 2_560


@dataclass(frozen=True)
class Number:
    """One number that an evaluation gives: how it is called, written and compared.

    key: its name in results.json and evaluation.json. label: its name for people. unit: "%" or nothing.
    better: which direction is better; None where neither is. digits: after the point, in tables; a single run is told
    with one more. column: whether tables of runs have it, always or where any run has the number; None keeps it to
    evaluation.json. effect: tables of recovery read the number with the smallest effect that is known, and no number
    without one. panel: the title of the bars in probes.png that it belongs to.
    """

    key: str
    label: str
    unit: Literal["%", ""] = ""
    better: Literal["higher", "lower"] | None = None
    digits: int = 2
    column: Literal["always", "known"] | None = None
    effect: int | None = None
    panel: str | None = None

    @property
    def title(self) -> str:
        """The label as the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def write(self, value: float | None, *, more: int = 0) -> str:
        """The value with `digits` and `more` digits after the point; "-" for None."""
        return "-" if value is None else f"{value:.{self.digits + more}f}"

    def round(self, value: float | None) -> float | None:
        """The value as rows of results.json keep it, with one digit more than tables show."""
        return None if value is None else round(value, self.digits + 1)


S = TypeVar("S", contravariant=True)


class Evaluation(ABC, Generic[S]):
    """Looks at a subject and gives numbers; changes nothing of it.

    numbers: what it gives, one record each. on: whether it is measured unless the settings switch it off; False where
    they have to switch it on. place: where its numbers stand in tables and plots, smaller first, then by name.
    """

    name: ClassVar[str]
    numbers: ClassVar[tuple[Number, ...]] = ()
    on: ClassVar[bool] = True
    place: ClassVar[int] = 100

    class Config(Settings):
        """The evaluation's settings, its block in `evaluate:`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def lacks(self, subject: S) -> str | None:
        """What the subject would need for this to mean something, as words for the log; None if it has everything.

        Where it lacks something the evaluation is not called, and its numbers are None.
        """
        return None

    @abstractmethod
    def __call__(self, subject: S) -> dict[str, Any]:
        """{key: value} for each of `numbers`, None where it does not apply; and details, which are lists and dicts."""


class Samples(Protocol):
    """The samples of a finished run in batches of one device. count: None, or more than there are, gives all of them in
    their order; else so many, drawn by the run's seed alone."""

    def test(self, count: int | None = None) -> Iterator[Batch]:
        """Clean test images."""

    def train(self, count: int | None = None) -> Iterator[Batch]:
        """Training images as they were trained on, poisoned and purified, without augmentation."""

    def clean(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train` in the same batches, without the poison and purified alike."""

    def augmented(self, count: int | None = None, *, view: int = 0) -> Iterator[Batch]:
        """The samples of `train`; x is that view of the run's own augmentation."""

    def crops(self, count: int | None = None) -> Iterator[Batch]:
        """The samples of `train`; x is a flipped, resized crop, whatever the run's own augmentation is."""


@dataclass(frozen=True)
class Subject:
    """A trained classifier or encoder and its samples: all that an evaluation may look at.

    num_classes: K; 1 for images without labels, which are all of one class. seed: the run's, of everything that is
    drawn. poisoned: whether the run itself poisons its samples, so that `samples.clean` differs from `samples.train`.
    legacy: whether numbers are drawn as VESPR's authors do. tested: whether there are test images; without them
    `samples.test` gives nothing. Features are computed when first asked for, once.
    """

    method: SSLMethod
    samples: Samples
    num_classes: int
    seed: int = 0
    poisoned: bool = False
    legacy: bool = False
    tested: bool = True

    def without_classes(self) -> str | None:
        """Why an accuracy would mean nothing, or None."""
        if self.num_classes > 1:
            return None
        return (
            "the samples are all of one class, as images without labels are, and whatever the features, all would be "
            "right; for accuracies train on labelled images"
        )

    def without_test(self) -> str | None:
        """Why nothing can be measured on test images, or None."""
        return None if self.tested else "there are no test images; for numbers on them set data.test"

    @property
    def device(self) -> torch.device:
        """Where the method is."""
        return next(self.method.parameters()).device

    @cached_property
    def train_features(self) -> Features:
        """Of every training sample."""
        return extract(self.method.encoder, self.samples.train())

    @cached_property
    def test_features(self) -> Features:
        """Of every test sample."""
        return extract(self.method.encoder, self.samples.test())

    @cached_property
    def bank(self) -> Features:
        """What k-NN compares with: the training features; with legacy those of augmented training images."""
        return extract(self.method.encoder, self.samples.crops(LEGACY_BANK)) if self.legacy else self.train_features

    @cached_property
    def queries(self) -> Features:
        """What k-NN classifies: the test features; with legacy those of fewer test images."""
        return extract(self.method.encoder, self.samples.test(LEGACY_QUERIES)) if self.legacy else self.test_features

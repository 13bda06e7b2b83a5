"""Accuracy of the classifier that came out of training, on clean images."""

from collections.abc import Iterable
from typing import Any

import torch

from poisonshield.batch import Batch
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import pixels_and_labels
from poisonshield.method import SSLMethod


class Classifier(Evaluation[Subject]):
    """Accuracy of the classifier on test and training images."""

    name = "classifier"
    place = 10
    numbers = (
        Number("test_top1", "classifier", "%", "higher", digits=1, column="always"),
        Number("train_top1", "classifier, training images", "%", "higher", digits=1),
    )

    def lacks(self, subject: Subject) -> str | None:
        """Two classes or more."""
        return subject.without_classes()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """None for a method without a classifier, and for test images where there are none."""
        samples = {"test_top1": subject.samples.test, "train_top1": subject.samples.train}
        if not subject.tested:
            del samples["test_top1"]
        found = {key: classifier(subject.method, batches()) for key, batches in samples.items()}
        return {"test_top1": None, **found}


@torch.no_grad()
def classifier(method: SSLMethod, batches: Iterable[Batch]) -> float | None:
    """Top-1 accuracy in percent of `method.logits`, evaluation mode; None without a classifier or samples."""
    training = method.training
    method.eval()
    right = total = 0
    try:
        for batch in batches:
            x, y = pixels_and_labels(batch)
            scores = method.logits(x.contiguous(memory_format=torch.channels_last))
            if scores is None:
                return None
            right += int((scores.argmax(1) == y).sum())
            total += len(batch)
    finally:
        method.train(training)
    return 100.0 * right / total if total else None

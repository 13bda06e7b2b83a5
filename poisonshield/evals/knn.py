"""k nearest neighbours: does the feature space group classes, without training anything?"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from poisonshield.config import Settings
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import Features, check_features
from poisonshield.ops.check import check_number


class KNN(Evaluation[Subject]):
    """A vote among the nearest training features."""

    name = "knn"
    place = 20
    numbers = (Number("knn_top1", "k-NN", "%", "higher", digits=1, column="always"),)

    class Config(Settings):
        """How the neighbours vote."""

        k: int = Field(20, ge=1, description="Neighbours that vote.")
        weighted: bool = Field(False, description="Nearer neighbours count more; otherwise each has one vote.")
        temperature: float = Field(0.07, gt=0, description="Of weighted votes: one counts exp(cosine / temperature).")

    def lacks(self, subject: Subject) -> str | None:
        """Two classes or more, and test images."""
        return subject.without_classes() or subject.without_test()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Of the subject's queries, by its bank."""
        settings = self.config.model_dump()
        return {"knn_top1": knn(subject.bank, subject.queries, num_classes=subject.num_classes, **settings)}


def knn(
    train: Features,
    test: Features,
    *,
    k: int = 20,
    num_classes: int,
    weighted: bool = False,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in percent of a vote among the k most similar (cosine) training features, on the features' device.

    All training samples are used. By default each neighbour has one vote, and ties go to the class whose neighbours are
    more similar in sum. weighted: a vote counts exp(cosine / temperature). Source: Wu et al. 2018, 1805.01978.
    Raises DataError for no samples or a label outside the classes; either side may lack classes.
    """
    check_number("k", k, least=1, whole=True)
    check_number("temperature", temperature, above=0)
    check_features(train, test, num_classes)
    bank = F.normalize(train.h, dim=1)
    k = min(k, len(bank))
    right = torch.zeros((), dtype=torch.int64, device=bank.device)
    for h, y in zip(F.normalize(test.h, dim=1).split(1024), test.y.split(1024), strict=True):
        similarity, index = (h @ bank.T).topk(k, dim=1)
        # A vote counts 1; similarities add less than one vote over all k, so they only break ties.
        weight = (similarity.double() / temperature).exp() if weighted else 1 + similarity.double() / (4 * k)
        votes = h.new_zeros(len(h), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, train.y[index], weight)
        right += (votes.argmax(1) == y).sum()
    return 100.0 * int(right) / len(test.y)

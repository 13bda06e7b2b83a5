"""k nearest neighbours: does the feature space group classes, without training anything?"""

import torch
import torch.nn.functional as F

from poisonshield.evals.parts.features import Features


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
    """
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

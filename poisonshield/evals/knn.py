"""k nearest neighbours: does the feature space group classes, without training anything?"""

import torch
import torch.nn.functional as F

from poisonshield.evals.features import Features


def knn(train: Features, test: Features, *, k: int = 20, num_classes: int) -> float:
    """Top-1 accuracy in percent of a majority vote among the k most similar (cosine) training features.

    All training samples are used; ties go to the class whose neighbours are more similar in sum.
    """
    bank = F.normalize(train.h, dim=1)
    k = min(k, len(bank))
    right = 0
    for h, y in zip(F.normalize(test.h, dim=1).split(1024), test.y.split(1024), strict=True):
        similarity, index = (h @ bank.T).topk(k, dim=1)
        votes = h.new_zeros(len(h), num_classes, dtype=torch.float64)
        # A vote counts 1; similarities add less than one vote over all k, so they only break ties.
        votes.scatter_add_(1, train.y[index], 1 + similarity.double() / (4 * k))
        right += int((votes.argmax(1) == y).sum())
    return 100.0 * right / len(test.y)

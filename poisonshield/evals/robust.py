"""Robust accuracy: the classifier under PGD, on clean images, read from the class scores."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch
from poisonshield.method import Method


def robust(
    method: Method, batches: Iterable[Batch], *, eps: float, steps: int, step_size: float, max_samples: int, seed: int
) -> float | None:
    """Top-1 accuracy in percent on the first max_samples samples after an linf attack; None without a classifier.

    eps and step_size in pixel units. An upper bound of the true robust accuracy, as every attack's result is.
    """
    attack, budget = PGD(steps, step_size), Linf(eps)
    right = total = 0
    with frozen_stats(method):
        for batch in batches:
            if total >= max_samples:
                break
            x, y = batch.x[: max_samples - total], batch.y[: max_samples - total]
            batch = batch.replace(keys=batch.keys[: len(x)], x=x, y=y)

            def objective(v: Tensor, y: Tensor = y) -> Tensor:
                return F.cross_entropy(method.logits(v).float(), y, reduction="none")

            with torch.no_grad():
                if method.logits(x[:1]) is None:
                    return None
            x_adv = attack(objective, x, budget, batch.random(seed, x.device).within("robust"))
            with torch.no_grad():
                right += int((method.logits(x_adv).argmax(1) == y).sum())
            total += len(y)
    return 100.0 * right / total

"""Robust accuracy: the classifier under PGD, on clean images, read from the class scores."""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch
from poisonshield.method import Method


def robust(
    method: Method,
    batches: Iterable[Batch],
    *,
    eps: float,
    steps: int,
    step_size: float,
    max_samples: int | None = None,
    restarts: int = 1,
    loss: Literal["ce", "logit"] = "ce",
    seed: int,
) -> float | None:
    """Top-1 accuracy in percent after an linf attack on the first max_samples (None: all); None without a classifier.

    A sample counts as right if it stays right in every one of `restarts` attacks from different random starts. loss:
    cross-entropy, or the negative score of the true class, as VESPR's authors evaluate. eps and step_size in pixel
    units. An upper bound of the true robust accuracy, as every attack's result is.
    """
    attack, budget = PGD(steps=steps, step_size=step_size), Linf(eps)
    right = total = 0
    with frozen_stats(method):
        for batch in batches:
            if max_samples is not None and total >= max_samples:
                break
            taken = len(batch) if max_samples is None else max_samples - total
            x, y = batch.x[:taken], batch.y[:taken]
            batch = batch.replace(keys=batch.keys[: len(x)], x=x, y=y)

            def objective(v: Tensor, y: Tensor = y) -> Tensor:
                scores = method.logits(v).float()
                return (
                    F.cross_entropy(scores, y, reduction="none")
                    if loss == "ce"
                    else -scores.gather(1, y[:, None])[:, 0]
                )

            with torch.no_grad():
                if method.logits(x[:1]) is None:
                    return None
            stays = torch.ones_like(y, dtype=torch.bool)
            for restart in range(restarts):
                rng = batch.random(seed, x.device).within("robust" if restart == 0 else f"robust/{restart}")
                x_adv = attack(objective, x, budget, rng)
                with torch.no_grad():
                    stays &= method.logits(x_adv).argmax(1) == y
            right += int(stays.sum())
            total += len(y)
    return 100.0 * right / total

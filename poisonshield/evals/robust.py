"""Robust accuracy: the classifier under PGD, on clean images, read from the class scores."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from poisonshield.attacks import PGD, Linf, frozen_stats
from poisonshield.batch import Batch
from poisonshield.config import Pixels, Settings
from poisonshield.evals.base import Evaluation, Number, Subject
from poisonshield.evals.parts.features import pixels_and_labels
from poisonshield.method import SSLMethod

LEGACY_ATTACKED = 1_024  # VESPR's authors attack one batch of as many


class Robust(Evaluation[Subject]):
    """Accuracy of the classifier on attacked test images."""

    name = "robust"
    place = 40
    numbers = (Number("robust_top1", "classifier under attack", "%", "higher", digits=1),)

    class Config(Settings):
        """The attack."""

        eps: Pixels = Field(4 / 255, description="Largest change of a pixel.")
        step_size: Pixels = Field(1 / 255, description="Change of a pixel in one step.")
        steps: int = Field(10, ge=1, description="Steps of one attack.")
        restarts: int = Field(1, ge=1, description="Attacks from different random starts; each has to fail.")
        loss: Literal["ce", "logit"] = Field(
            "ce", description="What the attack raises: cross-entropy, or the negative score of the true class."
        )
        samples: int | None = Field(None, ge=1, description="Test images, drawn with the run's seed; null for all.")

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """None for a method without a classifier."""
        settings = self.config.model_dump()
        count = settings.pop("samples")
        if subject.legacy:
            count, settings["loss"] = LEGACY_ATTACKED, "logit"
        return {"robust_top1": robust(subject.method, subject.samples.test(count), seed=subject.seed, **settings)}


def robust(
    method: SSLMethod,
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
            x, y = (values[:taken] for values in pixels_and_labels(batch))
            batch = batch.replace(keys=batch.keys[: len(x)], x=x, y=y)

            with torch.no_grad():
                if method.logits(x[:1]) is None:
                    return None

            def objective(v: Tensor, y: Tensor = y) -> Tensor:
                scores = _scores(method, v).float()
                if loss == "ce":
                    return F.cross_entropy(scores, y, reduction="none")
                return -scores.gather(1, y[:, None])[:, 0]

            stays = torch.ones_like(y, dtype=torch.bool)
            for restart in range(restarts):
                rng = batch.random(seed, x.device).within("robust" if restart == 0 else f"robust/{restart}")
                x_adv = attack(objective, x, budget, rng)
                with torch.no_grad():
                    stays &= _scores(method, x_adv).argmax(1) == y
            right += int(stays.sum())
            total += len(y)
    return 100.0 * right / total


def _scores(method: SSLMethod, x: Tensor) -> Tensor:
    """Class scores [B, K] of a method that has a classifier."""
    scores = method.logits(x)
    assert scores is not None
    return scores
